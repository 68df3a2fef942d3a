#!/usr/bin/env python
"""Find the thresholds of merging that give the best PQ on a validation set.

    python tools/tune_merging.py --config-file configs/quickstart.yaml \
        MODEL.WEIGHTS output/quickstart/model_final.pth

The network runs once over the first dataset of DATASETS.TEST; its raw outputs are kept in the
output folder, so that the next run with the same network only sweeps. Every combination of the four
thresholds is counted, the config's own included. The output folder gets best.yaml, the config lines
of the best setting; thresholds.png; results.json, PQ, PQ_th and PQ_st of every setting.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch)

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from matplotlib.figure import Figure
from pycocotools import mask as mask_util
from tabulate import tabulate
from tqdm import tqdm

from panoptic_fpn_ext.data import PanopticFPNMapper
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.engine import setup_prediction, trained_model
from panoptic_fpn_ext.evaluation.panoptic_matching import (
    Category,
    CategoryMatches,
    match_segments,
)
from panoptic_fpn_ext.evaluation.rle import encode_masks
from panoptic_fpn_ext.layers.argmax import argmax_classes
from panoptic_fpn_ext.layers.pasting import PastedMasks
from panoptic_fpn_ext.modeling import merge_panoptic
from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor


class Setting(NamedTuple):
    """The thresholds of merging; of a grid, the values of each that are swept, ascending."""

    score: Any
    overlap: Any
    nms: Any
    stuff_area: Any


KEYS = Setting("INSTANCES_CONFIDENCE_THRESH", "OVERLAP_THRESH", "NMS_THRESH", "STUFF_AREA_LIMIT")
"""Under ``MODEL.PANOPTIC_FPN.COMBINE``."""

SCORES = tuple(k / 20 for k in range(2, 19))
OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
NMS = (0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
STUFF_AREA_FACTORS = (0, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)  # of the config's, or of 1024

METRICS = ("PQ", "PQ_th", "PQ_st")
LINES = {  # of the metrics, in plots; PQ is one of the others where there are only things or stuff
    "PQ": {"color": "C0", "linewidth": 4, "alpha": 0.5},
    "PQ of things": {"color": "C1", "marker": "o", "markersize": 4},
    "PQ of stuff": {"color": "C2", "marker": "s", "markersize": 4},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        tune(parse(arguments))
    except UserError as error:
        print(f"tune_merging.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntune_merging.py: interrupted; what the network gave is kept", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tune_merging.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=Path, help="default: OUTPUT_DIR/tune_merging")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--workers", type=int, metavar="N", help="default: one for each core")
    values = parser.add_argument_group("values to sweep, as in --score 0.4,0.5,0.6")
    values.add_argument("--score", help="an instance is dropped below")
    values.add_argument("--overlap", help="... if more than this share of it is taken already")
    values.add_argument("--nms", help="... if its box has more IoU with a better one; 1: never")
    values.add_argument("--stuff-area", help="pixels; smaller stuff regions are left void")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(arguments)
    return args


def tune(args: argparse.Namespace) -> None:
    for option in ("limit", "workers"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise UserError(f"--{option} {number}: must be at least 1")
    cfg = setup_prediction(args.config_file, args.opts)
    own = setting_of(cfg)
    grid = read_grid(args, own, lowest_score=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST)
    dataset = cfg.DATASETS.TEST[0]
    records = panoptic_records(dataset)
    output = args.output or Path(cfg.OUTPUT_DIR, "tune_merging")

    folder = output / "raw_outputs" / fingerprint(cfg, records)
    records = records[: args.limit]
    kept = [folder / f"{place:06d}.npz" for place in range(len(records))]
    keep_raw_outputs(cfg, records, kept)

    count = functools.partial(
        count_kept,
        grid=grid,
        thing_sem_seg_ids=PanopticPostprocessor(cfg).merging["thing_sem_seg_ids"],
    )
    totals = Totals(grid, panoptic_categories(dataset))
    num_settings = math.prod(map(len, grid))
    images = parallel_map(count, list(zip(kept, records, strict=True)), args.workers)
    for counts in tqdm(
        images, f"{num_settings} settings", len(records), unit="image", dynamic_ncols=True
    ):
        totals.add(counts)

    result = Result(grid, own, totals.qualities())
    files = write(result, output, dataset, len(records))
    print(f"\n{len(records)} images of {dataset}, {num_settings} settings\n\n{report(result)}\n")
    print(*files, sep="\n")


# What to sweep


def setting_of(cfg: CfgNode) -> Setting:
    """The config's own."""
    return Setting(*(cfg.MODEL.PANOPTIC_FPN.COMBINE[key] for key in KEYS))


def read_grid(args: argparse.Namespace, own: Setting, lowest_score: float) -> Setting:
    """The values of each threshold, those of ``own`` among them.

    Args:
        args: ``score``, ``overlap``, ``nms`` and ``stuff_area``, each as "1,2,3" or None.
        own: the config's setting.
        lowest_score: the network returns no instances below.

    Raises:
        UserError: a value that is none or is out of range.
    """
    areas = tuple(int(factor * (own.stuff_area or 1024)) for factor in STUFF_AREA_FACTORS)
    defaults = Setting([s for s in SCORES if s >= lowest_score], OVERLAPS, NMS, areas)
    axes = []
    for name, default, value_of_config in zip(Setting._fields, defaults, own, strict=True):
        text = getattr(args, name)
        option = f"--{name.replace('_', '-')}"
        values = default if text is None else _numbers(text, option, whole=name == "stuff_area")
        if name == "overlap" and max(values) == 1:
            raise UserError(
                "--overlap 1: instances that others hide wholly would be segments without a pixel; "
                "values must be below 1"
            )
        if name == "score" and min(values) < lowest_score:
            raise UserError(
                f"--score {min(values)}: the network returns no instances below "
                f"MODEL.ROI_HEADS.SCORE_THRESH_TEST {lowest_score}; lower that too"
            )
        axes.append(tuple(sorted({*values, value_of_config})))
    return Setting(*axes)


def _numbers(text: str, option: str, *, whole: bool) -> list[float]:
    try:
        values = [int(part) if whole else float(part) for part in text.split(",")]
        if not all(value >= 0 and (whole or value <= 1) for value in values):
            raise ValueError
    except ValueError:
        allowed = "numbers of pixels" if whole else "numbers from 0 to 1"
        raise UserError(f"{option} {text}: expected {allowed}, separated by commas") from None
    return values


def panoptic_records(dataset: str) -> list[dict[str, Any]]:
    records = DatasetCatalog.get(dataset)
    if "thing_sem_seg_ids" not in MetadataCatalog.get(dataset).as_dict() or any(
        "pan_seg_file_name" not in record for record in records
    ):
        raise UserError(
            f"DATASETS.TEST: {dataset!r} is not registered with panoptic ground truth "
            "(register_panoptic_dataset does it)"
        )
    return records


def panoptic_categories(dataset: str) -> list[Category]:
    metadata = MetadataCatalog.get(dataset)
    things = [(True, i) for i in range(len(metadata.thing_classes))]
    stuff = set(range(len(metadata.stuff_classes))) - set(metadata.thing_sem_seg_ids)
    return things + [(False, i) for i in sorted(stuff)]


# What the network gives


@dataclass
class RawOutputs:
    """What merging needs of an image: semantic classes, and instances by their number."""

    sem_seg: np.ndarray  # (H, W) uint8 or uint16
    boxes: np.ndarray  # (N, 4) float32
    scores: np.ndarray  # (N,) float32
    classes: np.ndarray  # (N,) int64
    masks: list[bytes]  # N, as COCO's compressed runs

    @classmethod
    def from_model(cls, output: dict[str, Any]) -> "RawOutputs":
        """From ``sem_seg`` and ``instances`` of a model's output; the latter may be missing."""
        logits = output["sem_seg"]
        dtype = np.uint8 if len(logits) <= 256 else np.uint16
        sem_seg = argmax_classes(logits).cpu().numpy().astype(dtype)
        if "instances" not in output:
            boxes, classes = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
            return cls(sem_seg, boxes, np.zeros(0, np.float32), classes, [])
        instances = output["instances"].to("cpu")
        return cls(
            sem_seg=sem_seg,
            boxes=instances.pred_boxes.tensor.numpy(),
            scores=instances.scores.numpy(),
            classes=instances.pred_classes.numpy(),
            masks=[rle["counts"] for rle in encode_masks(instances.pred_masks.numpy())],
        )

    def save(self, path: Path) -> None:
        """Write an ``.npz``, whole or not at all."""
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file,
                sem_seg=self.sem_seg,
                boxes=self.boxes,
                scores=self.scores,
                classes=self.classes,
                runs=np.frombuffer(b"".join(self.masks), np.uint8),
                run_lengths=np.array([len(mask) for mask in self.masks], dtype=np.int64),
            )
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "RawOutputs":
        with np.load(path) as file:
            arrays = dict(file)
        runs, ends = arrays.pop("runs").tobytes(), np.cumsum(arrays.pop("run_lengths")).tolist()
        starts = [0, *ends][: len(ends)]
        return cls(**arrays, masks=[runs[a:b] for a, b in zip(starts, ends, strict=True)])

    def instances(self, lowest_score: float) -> Instances:
        """Those that reach a score, in their order, for :func:`merge_panoptic`."""
        height, width = self.sem_seg.shape
        # Compared as in merging: as doubles.
        chosen = np.flatnonzero(self.scores.astype(np.float64) >= lowest_score)
        return Instances(
            (height, width),
            pred_boxes=Boxes(torch.from_numpy(self.boxes[chosen])),
            scores=torch.from_numpy(self.scores[chosen]),
            pred_classes=torch.from_numpy(self.classes[chosen]),
            pred_masks=DecodedMasks.from_runs([self.masks[i] for i in chosen], height, width),
        )


class DecodedMasks(PastedMasks):
    """Masks that are pasted already, each as much of the image as its pixels need."""

    def __init__(self, windows: Sequence[tuple[tuple[slice, slice], torch.Tensor]]) -> None:
        self.windows = windows

    @classmethod
    def from_runs(cls, masks: Iterable[bytes], height: int, width: int) -> "DecodedMasks":
        windows = []
        for counts in masks:
            rle = {"size": [height, width], "counts": counts}
            x, y, w, h = map(int, mask_util.toBbox(rle))
            where = slice(y, y + h), slice(x, x + w)
            mask = np.ascontiguousarray(mask_util.decode(rle)[where]).view(bool)
            windows.append((where, torch.from_numpy(mask)))
        return cls(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, indices: torch.Tensor) -> "DecodedMasks":
        return DecodedMasks([self.windows[index] for index in indices.tolist()])

    def window(self, index: int) -> tuple[tuple[slice, slice], torch.Tensor]:
        return self.windows[index]


def fingerprint(cfg: CfgNode, records: Iterable[dict[str, Any]]) -> str:
    """A name for what the raw outputs depend on: network, weights, images; not on merging."""
    model = cfg.MODEL.clone()
    model.defrost()
    del model.PANOPTIC_FPN["COMBINE"]
    model.WEIGHTS = ""
    model.PANOPTIC_FPN.OUTPUTS = []
    weights = Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS)).read_bytes()
    images = []
    for record in records:
        file = Path(record["file_name"])
        status = file.stat() if file.exists() else None
        images.append((str(file), status and (status.st_size, status.st_mtime_ns)))
    parts = (
        model.dump(),
        cfg.INPUT.dump(),
        str(cfg.TEST.DETECTIONS_PER_IMAGE),
        hashlib.sha256(weights).hexdigest(),
        json.dumps(images),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def keep_raw_outputs(
    cfg: CfgNode, records: Sequence[dict[str, Any]], paths: Sequence[Path]
) -> None:
    """Run the network over the images whose raw outputs are not kept yet."""
    todo = [
        (record, path) for record, path in zip(records, paths, strict=True) if not path.exists()
    ]
    if not todo:
        return
    cfg = cfg.clone()
    cfg.defrost()
    instances = ["instances"] if cfg.MODEL.ROI_HEADS.NUM_CLASSES else []  # only stuff has none
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = ["sem_seg", *instances]
    model = trained_model(cfg)
    loader = build_detection_test_loader(
        [record for record, _ in todo],
        mapper=PanopticFPNMapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        zip(todo, loader, strict=True),
        "network",
        len(paths),
        initial=len(paths) - len(todo),
        unit="image",
        dynamic_ncols=True,
    )
    with torch.no_grad():
        for (_, path), inputs in bar:
            (output,) = model(inputs)
            RawOutputs.from_model(output).save(path)


# The sweep


@dataclass
class ImageCounts:
    """What an image adds to the totals of every setting.

    Many settings accept the same instances of an image, and so have the same outcome.
    """

    outcomes: np.ndarray  # (scores, overlaps, nms) int: which outcome
    counts: np.ndarray  # (num_outcomes, stuff_areas, categories, 5), see `_counts`
    categories: list[Category]  # that the image has


def count_kept(
    kept: tuple[Path, dict[str, Any]], grid: Setting, thing_sem_seg_ids: Collection[int]
) -> ImageCounts:
    """:func:`count_image` of the raw outputs in a file, and the dataset's record of the image."""
    path, record = kept
    source = record["pan_seg_file_name"]
    return count_image(
        RawOutputs.load(path),
        read_panoptic_png(source),
        record["segments_info"],
        grid,
        thing_sem_seg_ids,
        source=source,
    )


def count_image(
    raw: RawOutputs,
    gt_ids: np.ndarray,
    gt_segments: Sequence[dict[str, Any]],
    grid: Setting,
    thing_sem_seg_ids: Collection[int],
    source: str = "ground truth",
) -> ImageCounts:
    """Merge and match at every setting of a grid; equal to doing so one by one, but faster.

    * Whether an instance is accepted depends on those of higher scores alone: the instances
      accepted at a score threshold are those accepted at the lowest one that reach it.
    * The accepted instances alone make the map, whichever thresholds accepted them.
    * A class has one stuff segment; left void, it takes nothing from any other.

    Args:
        raw: of the image.
        gt_ids, gt_segments: as for :func:`match_segments`.
        grid: the values of each threshold.
        thing_sem_seg_ids: as for :func:`merge_panoptic`.
        source: what to call the ground truth in errors.
    """
    instances = raw.instances(min(grid.score))
    merge = functools.partial(
        merge_panoptic,
        sem_seg=torch.from_numpy(raw.sem_seg).long(),
        thing_sem_seg_ids=thing_sem_seg_ids,
        stuff_area_thresh=1,
    )
    reaches = [(instances.scores.double() >= score).tolist() for score in grid.score]
    outcome_of: dict[tuple[int, ...], int] = {}
    outcomes = np.empty((len(grid.score), len(grid.overlap), len(grid.nms)), dtype=np.int64)
    for (j, overlap), (k, nms) in itertools.product(enumerate(grid.overlap), enumerate(grid.nms)):
        _, segments = merge(
            instances,
            instances_score_thresh=min(grid.score),
            overlap_threshold=overlap,
            nms_thresh=nms,
        )
        accepted = [segment["instance_id"] for segment in segments if segment["isthing"]]
        for i, reached in enumerate(reaches):
            chosen = tuple(index for index in accepted if reached[index])
            outcomes[i, j, k] = outcome_of.setdefault(chosen, len(outcome_of))

    matches, areas = [], []
    for chosen in outcome_of:
        alone = instances[torch.tensor(chosen, dtype=torch.long)]
        alone.scores = torch.arange(len(chosen), 0, -1)  # the same order, also of equal scores
        panoptic_seg, segments = merge(alone, instances_score_thresh=0, overlap_threshold=1)
        matches.append(
            match_segments(gt_ids, gt_segments, panoptic_seg.numpy(), segments, gt_source=source)
        )
        areas.append({(False, s["category_id"]): s["area"] for s in segments if not s["isthing"]})

    categories = sorted({category for found in matches for category in found})
    counts = np.zeros((len(matches), len(grid.stuff_area), len(categories), 5))
    for outcome, limit in np.ndindex(counts.shape[:2]):
        for place, category in enumerate(categories):
            found = matches[outcome].get(category, CategoryMatches())
            if areas[outcome].get(category, math.inf) < grid.stuff_area[limit]:
                lost = found.false_negatives + found.true_positives
                found = CategoryMatches(false_negatives=lost)
            counts[outcome, limit, place] = _counts(found)
    return ImageCounts(outcomes, counts, categories)


def _counts(matches: CategoryMatches) -> tuple[float, ...]:
    """Numbers of TP, FP and FN, and the sum of IoUs: leading bits, and the others.

    Sums of each of the two are exact for up to 2**26 segments.
    """
    ious = np.array(matches.ious)
    leading = np.floor(ious * 2**26) / 2**26
    return (
        matches.true_positives,
        matches.false_positives,
        matches.false_negatives,
        leading.sum(),
        (ious - leading).sum(),
    )


class Totals:
    """Segments of all images at every setting of a grid."""

    def __init__(self, grid: Setting, categories: Sequence[Category]) -> None:
        self.grid = grid
        self.categories = list(categories)
        self.counts = np.zeros((*map(len, grid), len(categories), 5))

    def add(self, image: ImageCounts) -> None:
        """
        Raises:
            UserError: the image has a category that the dataset has not.
        """
        for isthing, category in set(image.categories) - set(self.categories):
            raise UserError(
                f"{'thing' if isthing else 'stuff'} category {category} is predicted or in the "
                "ground truth, but is none of the dataset"
            )
        places = [self.categories.index(category) for category in image.categories]
        self.counts[:, :, :, :, places] += image.counts[image.outcomes]

    def qualities(self) -> dict[str, np.ndarray]:
        """PQ, PQ_th and PQ_st of every setting, as :class:`PanopticQualityEvaluator` gives them.

        Returns:
            For each an array of the grid's shape, in percent; nan where there are no segments.
        """
        tp, fp, fn, *iou = np.moveaxis(self.counts, -1, 0)
        with np.errstate(invalid="ignore"):
            pq = sum(iou) / (tp + 0.5 * fp + 0.5 * fn)
        isthing = np.array([isthing for isthing, _ in self.categories], dtype=bool)
        splits = (pq, pq[..., isthing], pq[..., ~isthing])
        shape = pq.shape[:-1]
        return {
            metric: np.array([_mean(split[place]) for place in np.ndindex(shape)]).reshape(shape)
            for metric, split in zip(METRICS, splits, strict=True)
        }


def _mean(qualities: np.ndarray) -> float:
    present = qualities[~np.isnan(qualities)]
    return 100 * math.fsum(present) / len(present) if len(present) else math.nan


def parallel_map(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int | None
) -> Iterator[Any]:
    """``map`` in several processes, by default one for each core."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    if workers == 1:
        yield from map(function, items)
        return
    # Forked from a process that has imported this module, and in which no threads run yet.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# What came out


class Result:
    """The qualities of all settings, and the best of them."""

    def __init__(self, grid: Setting, own: Setting, qualities: dict[str, np.ndarray]) -> None:
        """
        Raises:
            UserError: there are no segments, so that there is no PQ.
        """
        pq = qualities["PQ"]
        if np.isnan(pq).all():
            raise UserError("the images have no segments, true or predicted: nothing to tune")
        self.grid = grid
        self.qualities = qualities
        self.own = tuple(axis.index(value) for axis, value in zip(grid, own, strict=True))
        # Of equal settings that which changes the config least.
        best = np.argwhere(pq == np.nanmax(pq))
        distance = np.abs(best - self.own)
        self.best = tuple(best[np.lexsort((distance.sum(1), (distance > 0).sum(1)))[0]].tolist())

    def setting(self, place: Sequence[int]) -> Setting:
        return Setting(*(axis[i] for axis, i in zip(self.grid, place, strict=True)))

    def scores(self, place: tuple[int, ...]) -> list[float]:
        return [float(self.qualities[metric][place]) for metric in METRICS]

    def varied(self, axis: int, position: int) -> tuple[int, ...]:
        """The place of the best setting with one threshold changed."""
        return (*self.best[:axis], position, *self.best[axis + 1 :])


def config_lines(setting: Setting) -> str:
    combine = dict(zip(KEYS, setting, strict=True))
    nested = {"MODEL": {"PANOPTIC_FPN": {"COMBINE": combine}}}
    return yaml.safe_dump(nested, sort_keys=False)


def report(result: Result) -> str:
    """Tables, in Markdown, and the config lines of the best setting."""
    settings = [
        [name, *map(_short, result.setting(place)), *map(_percent, result.scores(place))]
        for name, place in (("config", result.own), ("best", result.best))
    ]
    worth, curves = [], []
    for axis, (name, values) in enumerate(zip(Setting._fields, result.grid, strict=True)):
        curve = [result.scores(result.varied(axis, i)) for i in range(len(values))]
        own, best = result.own[axis], result.best[axis]
        gain = curve[best][0] - curve[own][0]
        worth.append([name, _short(values[own]), _short(values[best]), _percent(gain)])
        rows = zip(values, curve, strict=True)
        curves.append(
            _table([name, *METRICS], [[_short(v), *map(_percent, row)] for v, row in rows])
        )
    return "\n\n".join(
        (
            _table(["", *Setting._fields, *METRICS], settings),
            "What each threshold is worth: the PQ that is lost with it alone as in the config.",
            _table(["", "config", "best", "PQ"], worth),
            "Each threshold, with the others at their best:",
            *curves,
            "Config lines of the best setting:",
            config_lines(result.setting(result.best)).rstrip(),
        )
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _short(threshold: float) -> str:
    return f"{threshold:g}" if isinstance(threshold, float) else str(threshold)


def _percent(quality: float) -> str:
    return "–" if math.isnan(quality) else f"{quality:.2f}"


def write(result: Result, output: Path, dataset: str, num_images: int) -> list[Path]:
    """Write ``best.yaml``, ``thresholds.png`` and ``results.json`` into a folder; their paths."""
    lines, picture, table = (
        output / name for name in ("best.yaml", "thresholds.png", "results.json")
    )
    pq, own_pq = (result.scores(place)[0] for place in (result.best, result.own))
    lines.write_text(
        f"# PQ {pq:.2f} on {num_images} images of {dataset}; as configured before, {own_pq:.2f}.\n"
        + config_lines(result.setting(result.best))
    )
    draw(result).savefig(picture, dpi=120)

    def entry(place: tuple[int, ...]) -> dict[str, float | None]:
        scores = (None if math.isnan(score) else score for score in result.scores(place))
        setting = result.setting(place)._asdict()
        return {**setting, **dict(zip(METRICS, scores, strict=True))}

    head = {
        "dataset": dataset,
        "num_images": num_images,
        "config": entry(result.own),
        "best": entry(result.best),
    }
    everything = map(entry, np.ndindex(result.qualities["PQ"].shape))
    with table.open("w") as file:
        file.write(json.dumps(head, indent=2)[:-2] + ',\n  "all": [\n    ')
        file.write(",\n    ".join(map(json.dumps, everything)) + "\n  ]\n}\n")
    return [lines, picture, table]


def draw(result: Result) -> Figure:
    """The qualities against each threshold, the others at their best."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(result.grid), sharey=True)
    for axis, (panel, values) in enumerate(zip(panels, result.grid, strict=True)):
        # What may coincide differs in width.
        panel.axvline(values[result.own[axis]], color="lightgrey", linewidth=6, label="config")
        panel.axvline(values[result.best[axis]], color="black", linewidth=0.8, label="best")
        scores = [result.scores(result.varied(axis, i)) for i in range(len(values))]
        for (label, style), column in zip(LINES.items(), zip(*scores, strict=True), strict=True):
            if not all(map(math.isnan, column)):
                panel.plot(values, column, label=label, **style)
        name = Setting._fields[axis]
        if name == "stuff_area":
            smallest = min((v for v in values if v), default=1)
            panel.set_xscale("symlog", linthresh=smallest)
            panel.set_xlim(left=-smallest / 3)
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(f"{name}\n{KEYS[axis]}", fontsize="small")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("percent", fontsize="small")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
