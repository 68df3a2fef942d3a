#!/usr/bin/env python
"""Time panoptic_fpn_ext against Detectron2, and check that both give the same answer.

    python tools/benchmark.py evaluation
    python tools/benchmark.py evaluation --sizes 1024x2048 --json evaluation.json

The two run by turns (A B A B ...), after one turn that is not counted, in one process and on one
core. Exit status 1 where their answers differ.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import detectron2
import numpy as np
import torch
from cityscapesscripts.evaluation import evalPanopticSemanticLabeling
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, SemSegEvaluator
from detectron2.structures import BitMasks, Instances
from PIL import Image
from tabulate import tabulate

from panoptic_fpn_ext import register_panoptic_dataset
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.data.targets import sem_seg_from_panoptic
from panoptic_fpn_ext.evaluation import (
    InstanceAPEvaluator,
    PanopticQualityEvaluator,
    SemSegIoUEvaluator,
)
from panoptic_fpn_ext.evaluation.detectron2_evaluators import instances_json


@dataclass
class Times:
    """Milliseconds an image: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.lower:.1f}-{self.upper:.1f})"


@dataclass
class Comparison:
    """One thing measured of both."""

    what: str
    size: str
    ours_ms: Times
    detectron2_ms: Times
    ratio: float
    same_answer: bool


Result = Mapping[str, float]


def compare(
    what: str,
    size: str,
    ours: Callable[[], Result],
    detectron2: Callable[[], Result],
    *,
    num_images: int,
    rounds: int,
) -> Comparison:
    """Run both by turns; compare the numbers that both return."""
    results = ours(), detectron2()
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for times, run in zip(seconds, (ours, detectron2), strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    ours_ms, detectron2_ms = (summarize(times, num_images) for times in seconds)
    return Comparison(
        what=what,
        size=size,
        ours_ms=ours_ms,
        detectron2_ms=detectron2_ms,
        ratio=round(detectron2_ms.median / ours_ms.median, 2),
        same_answer=same(*results),
    )


def summarize(seconds: Sequence[float], num_images: int) -> Times:
    milliseconds = [1000 * s / num_images for s in seconds]
    lower, upper = np.quantile(milliseconds, (0.25, 0.75)).tolist()
    return Times(*(round(t, 3) for t in (statistics.median(milliseconds), lower, upper)))


def same(a: Result, b: Result) -> bool:
    """Whether the numbers under the keys of both, at least one, differ by less than 1e-9."""
    keys = a.keys() & b.keys()
    return bool(keys) and all(
        math.isclose(a[key], b[key], rel_tol=0, abs_tol=1e-9)
        or (math.isnan(a[key]) and math.isnan(b[key]))
        for key in keys
    )


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    return {
        "cpu": cpu,
        "cores": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "detectron2": detectron2.__version__,
    }


def use_one_core() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if hasattr(os, "sched_setaffinity"):  # threads of other libraries
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def report(comparisons: Sequence[Comparison], json_file: Path | None) -> None:
    """Print a table; write everything as JSON where asked for."""
    rows = [
        (c.what, c.size, c.ours_ms, c.detectron2_ms, c.ratio, "yes" if c.same_answer else "NO")
        for c in comparisons
    ]
    headers = ["", "size", "ours, ms an image", "Detectron2", "ratio", "same answer"]
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))
    print("Median and quartiles. " + ", ".join(f"{k} {v}" for k, v in environment().items()))
    if json_file:
        content = {
            "environment": environment(),
            "comparisons": [asdict(comparison) for comparison in comparisons],
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n")


# Evaluation

NUM_THINGS, NUM_STUFF = 8, 11  # as Cityscapes


def evaluation(args: argparse.Namespace) -> list[Comparison]:
    """PQ, mIoU and AP of made-up predictions.

    Each evaluator is built, given the predictions image by image and asked for its result. Of
    what Detectron2 wants converted before (semantic PNGs, instance annotations), nothing is timed.
    """
    comparisons = []
    for height, width in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            name = f"benchmark_{height}x{width}"
            outputs = make_dataset(name, Path(folder), height, width, args.images)
            records = DatasetCatalog.get(name)
            for what, builders in EVALUATORS.items():
                ours, detectron2 = (
                    functools.partial(evaluate, build, name, records, outputs) for build in builders
                )
                comparisons.append(
                    compare(
                        *(what, f"{height}x{width}", ours, detectron2),
                        num_images=len(records),
                        rounds=args.rounds,
                    )
                )
    return comparisons


def evaluate(
    build: Callable[[str], DatasetEvaluator],
    dataset_name: str,
    records: Iterable[dict],
    outputs: Iterable[dict],
) -> dict[str, float]:
    """The results of an evaluator, flat."""
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="ignore"):
        evaluator = build(dataset_name)
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            # Detectron2's panoptic evaluator changes the segments.
            output = {**output, "panoptic_seg": (ids, copy.deepcopy(segments))}
            evaluator.process([record], [output])
        results = evaluator.evaluate()
    return {f"{task}/{key}": value for task in results for key, value in results[task].items()}


class PanopticAPIEvaluator(DatasetEvaluator):
    """What Detectron2's COCOPanopticEvaluator and panopticapi do, on one core.

    A PNG of each prediction in memory, all of them into a folder in the end, and panopticapi's
    ``pq_compute_single_core``; where panopticapi is not installed, that of cityscapesscripts,
    which is the same algorithm.
    """

    def __init__(self, dataset_name: str) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._category_ids = {
            True: list(self._metadata.thing_dataset_id_to_contiguous_id),
            False: list(self._metadata.stuff_dataset_id_to_contiguous_id),
        }
        try:
            from panopticapi import evaluation as algorithm
        except ImportError:
            algorithm = evalPanopticSemanticLabeling
        self._algorithm = algorithm

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            with io.BytesIO() as file:
                Image.fromarray(rgb(ids.numpy())).save(file, format="PNG")
                png = file.getvalue()
            for segment in segments:
                category_ids = self._category_ids[segment.pop("isthing")]
                segment["category_id"] = category_ids[segment["category_id"]]
            self._predictions.append(
                {
                    "image_id": record["image_id"],
                    "file_name": f"{Path(record['file_name']).stem}.png",
                    "segments_info": segments,
                    "png": png,
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        truth = json.loads(Path(self._metadata.panoptic_json).read_text())
        predictions = {p["image_id"]: p for p in self._predictions}
        pairs = [(a, predictions[a["image_id"]]) for a in truth["annotations"]]
        categories = {category["id"]: category for category in truth["categories"]}
        with tempfile.TemporaryDirectory() as folder:
            for prediction in self._predictions:
                Path(folder, prediction["file_name"]).write_bytes(prediction.pop("png"))
            Path(folder, "predictions.json").write_text(json.dumps(self._predictions))
            counts = self._algorithm.pq_compute_single_core(
                0, pairs, self._metadata.panoptic_root, folder, categories
            )
        result = {}
        for suffix, isthing in (("", None), ("_th", True), ("_st", False)):
            average, _ = counts.pq_average(categories, isthing=isthing)
            result |= {f"{key.upper()}{suffix}": 100 * average[key] for key in ("pq", "sq", "rq")}
        return {"panoptic_seg": result}


EVALUATORS: dict[str, tuple[Callable[[str], DatasetEvaluator], ...]] = {
    "PQ": (PanopticQualityEvaluator.from_dataset, PanopticAPIEvaluator),
    "mIoU": (SemSegIoUEvaluator.from_dataset, SemSegEvaluator),
    "box and mask AP": (
        InstanceAPEvaluator.from_dataset,
        functools.partial(COCOEvaluator, use_fast_impl=False),
    ),
}
"""What is evaluated, and how: ours, Detectron2's."""


def rgb(ids: np.ndarray) -> np.ndarray:
    """Segment ids as panopticapi colours them: uint8 array (H, W, 3)."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


def make_dataset(
    name: str, folder: Path, height: int, width: int, num_images: int
) -> list[dict[str, Any]]:
    """Register a dataset of made-up images with all that the evaluators want of it.

    Returns:
        Predictions for its images, which are right in part.
    """
    for subfolder in ("panoptic", "sem_seg"):
        (folder / subfolder).mkdir()
    categories = [
        {"id": 10 + i, "name": f"category {i}", "isthing": int(i < NUM_THINGS)}
        for i in range(NUM_THINGS + NUM_STUFF)
    ]
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, height, width) for _ in range(num_images)]
    images, annotations = [], []
    for image_id, (ids, segments) in enumerate(scenes, 1):
        png = f"{image_id:06}.png"
        Image.fromarray(rgb(ids)).save(folder / "panoptic" / png)  # as official ones are written
        images.append(
            {"id": image_id, "file_name": f"{image_id:06}.jpg", "height": height, "width": width}
        )
        annotations.append(
            {
                "image_id": image_id,
                "file_name": png,
                "segments_info": [
                    {
                        "id": s["id"],
                        "category_id": s["category_id"] + (10 if s["isthing"] else 9 + NUM_THINGS),
                        "iscrowd": s["iscrowd"],
                        "area": int((ids == s["id"]).sum()),
                        "bbox": [0, 0, width, height],
                    }
                    for s in segments
                ],
            }
        )
    panoptic_json, json_file = folder / "panoptic.json", folder / "instances.json"
    panoptic_json.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    register_panoptic_dataset(name, folder, folder / "panoptic", panoptic_json)
    metadata = MetadataCatalog.get(name)
    json_file.write_text(json.dumps(instances_json(name)))
    metadata.set(json_file=str(json_file))

    records = DatasetCatalog.get(name)
    for record in records:
        path = folder / "sem_seg" / f"{record['image_id']}.png"
        labels = sem_seg_from_panoptic(
            read_panoptic_png(record["pan_seg_file_name"]),
            record["segments_info"],
            thing_sem_seg_ids=metadata.thing_sem_seg_ids,
            ignore_label=metadata.ignore_label,
        )
        Image.fromarray(labels).save(path)
        record["sem_seg_file_name"] = str(path)
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    return [make_prediction(rng, *scene) for scene in scenes]


def make_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[dict]]:
    """A panoptic map: stuff with winding borders, 12 to 30 objects before it, void, a crowd.

    Returns:
        int32 array (H, W) of ids up to 2**24 - 1, and the segments, category ids contiguous.
    """
    fields = [smooth_noise(rng, height, width, cells=5) for _ in range(NUM_STUFF)]
    labels = np.argmax(fields, axis=0) + 1
    labels[np.abs(smooth_noise(rng, height, width, cells=9)) < 0.02] = 0
    categories = [(False, i + 1) for i in range(NUM_STUFF)]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(12, 31)):
        radius = height * rng.uniform(0.03, 0.15)
        center = rng.uniform(0, height), rng.uniform(0, width)
        distance = np.hypot(rows - center[0], (columns - center[1]) * rng.uniform(0.5, 2))
        ragged = smooth_noise(rng, height, width, cells=24)
        categories.append((True, int(rng.integers(NUM_THINGS))))
        labels[distance < radius * (1 + 0.3 * ragged)] = len(categories)
    ids = np.concatenate(([0], rng.choice(2**24 - 1, len(categories), replace=False) + 1))
    seen = np.flatnonzero(np.bincount(labels.reshape(-1), minlength=len(ids))[1:])
    crowd = int(seen[-1])
    segments = [
        {
            "id": int(ids[k + 1]),
            "isthing": categories[k][0],
            "category_id": categories[k][1],
            "iscrowd": int(k == crowd),
        }
        for k in seen.tolist()
    ]
    return ids[labels].astype(np.int32), segments


def make_prediction(
    rng: np.random.Generator, ids: np.ndarray, segments: list[dict]
) -> dict[str, Any]:
    """A model's outputs for a scene: borders shifted, some categories wrong, some segments lost."""
    height, width = ids.shape
    reach = height / 80
    shift = [reach * smooth_noise(rng, height, width, cells=16) for _ in range(2)]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    places = cv2.remap(
        np.searchsorted(sorted(s["id"] for s in segments), ids).astype(np.uint8) + np.uint8(1),
        (columns + shift[0]).astype(np.float32),
        (rows + shift[1]).astype(np.float32),
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_REPLICATE,
    )
    places[ids == 0] = 0
    panoptic, panoptic_segments = np.zeros((height, width), np.int32), []
    logits = torch.from_numpy(rng.random((NUM_STUFF + 1, height, width), dtype=np.float32))
    masks, classes, scores = [], [], []
    for place, segment in enumerate(sorted(segments, key=lambda s: s["id"]), 1):
        mask = places == place
        if not mask.any():
            continue
        isthing, category = segment["isthing"], segment["category_id"]
        logits[0 if isthing else category][torch.from_numpy(mask)] += 1
        if isthing:
            for _ in range(2):
                masks.append(np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1)))
                wrong = rng.random() < 0.2
                classes.append(int(rng.integers(NUM_THINGS)) if wrong else category)
                scores.append(rng.random())
        if rng.random() < 0.9:
            panoptic_segments.append(
                {
                    "id": len(panoptic_segments) + 1,
                    "isthing": isthing,
                    "category_id": (category + 1) % NUM_THINGS
                    if isthing and rng.random() < 0.1
                    else category,
                }
            )
            panoptic[mask] = len(panoptic_segments)
    instances = Instances((height, width))
    instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
    instances.pred_boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    return {
        "panoptic_seg": (torch.from_numpy(panoptic), panoptic_segments),
        "sem_seg": logits,
        "instances": instances,
    }


def smooth_noise(rng: np.random.Generator, height: int, width: int, *, cells: int) -> np.ndarray:
    """Float32 array (H, W), about from -1 to 1, that changes over a ``cells``-th of the height."""
    grid = rng.uniform(-1, 1, (cells, max(1, cells * width // height))).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for instance 480x640")
    return int(height), int(width)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(required=True, metavar="WHAT")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=positive, default=5, help="default: 5")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")

    command = subcommands.add_parser(
        "evaluation", parents=[common], help="PQ, mIoU and AP of predictions"
    )
    command.add_argument(
        "--sizes", type=size, nargs="+", default=[(480, 640), (1024, 2048)], metavar="HxW"
    )
    command.add_argument("--images", type=positive, default=6, help="of each size; default: 6")
    command.set_defaults(run=evaluation)

    args = parser.parse_args()
    use_one_core()
    comparisons = args.run(args)
    report(comparisons, args.json)
    return 0 if all(comparison.same_answer for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
