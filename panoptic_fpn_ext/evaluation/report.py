"""report.html: one file that shows how good a network is on a dataset, and why.

Nothing but the few images shown is read again. Of each image a small index map of the prediction is
kept, some kilobytes.
"""

import json
import logging
import math
import os
import platform
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config_differences import differences, grouped_differences
from .analysis import IGNORED, MATCH
from .base import ImageEvaluator
from .instance_ap import InstanceAPEvaluator
from .merging_losses import Dropped, MergingThresholds, dropped_segments, merging_prices
from .page_pictures import ShownImage, index_png, picture
from .pages import KIND_TEXTS, plain, write_page
from .panoptic_errors import KINDS
from .panoptic_maps import read_ground_truth
from .panoptic_quality import PanopticQualityEvaluator
from .report_maps import NAME, write_maps
from .sem_seg_iou import SemSegIoUEvaluator

logger = logging.getLogger(__name__)

WORST, BEST, RANDOM, OF_EACH = 12, 6, 6, 2
MOST_IMAGES = 80
CONFUSIONS = 25
FEW_IMAGES = 1000  # with more the interval of AP takes minutes: TEST.INTERVALS asks for it

HEADLINES = (
    ("panoptic_seg", "PQ", "PQ"),
    ("panoptic_seg", "PQ_th", "PQ things"),
    ("panoptic_seg", "PQ_st", "PQ stuff"),
    ("sem_seg", "mIoU", "mIoU"),
    ("segm", "AP", "mask AP"),
    ("bbox", "AP", "box AP"),
)


@dataclass
class ImagePrediction:
    """What is kept of an image.

    Attributes:
        record: its dataset dict, without what is not drawn.
        png: of the map, 8-bit, which segment, from 1, each pixel belongs to; 0 is void.
        scores: of the segments, by id; of stuff None.
        dropped: what merging has dropped of missed segments; None where that is not known.
    """

    record: dict[str, Any]
    png: bytes
    scores: dict[int, float | None]
    dropped: list[Dropped] | None


class ReportWriter(ImageEvaluator[ImagePrediction]):
    """Writes ``report.html`` and ``report.json`` when other evaluators have their scores.

    It must see the images after them and be evaluated after them. Works in several processes, of
    which the first one writes; it reads the images that it shows.
    """

    output_key = "panoptic_seg"

    def __init__(
        self,
        *,
        folder: str | os.PathLike,
        dataset_name: str,
        evaluators: Sequence[ImageEvaluator],
        cfg: CfgNode | None = None,
        merging: MergingThresholds | None = None,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            folder: where to write.
            dataset_name: what is evaluated; its metadata has names and colours.
            evaluators: those whose scores are shown; among them a
                :class:`PanopticQualityEvaluator`.
            cfg: the config to show.
            merging: by which the predictions are merged, to show what that drops.
            distributed: gather from all processes; otherwise each writes its own.
        """
        super().__init__(distributed=distributed)
        self._folder = Path(folder)
        self._name = dataset_name
        self._evaluators = list(evaluators)
        self._panoptic = next(e for e in evaluators if isinstance(e, PanopticQualityEvaluator))
        self._cfg = cfg
        self._merging = merging

    def reset(self) -> None:
        super().reset()
        self._began = time.time()

    def read(self, output: Mapping[str, Any]) -> Mapping[str, Any]:
        return output

    def evaluate_image(
        self, record: Mapping[str, Any], prediction: Mapping[str, Any], source: str
    ) -> ImagePrediction:
        """A small map of an image's prediction, and what merging has dropped.

        Args:
            record: dataset dict with ``file_name`` and ``pan_seg_file_name``.
            prediction: all outputs of the model: ``panoptic_seg``, see
                :class:`PanopticQualityEvaluator`, and see :func:`dropped_segments`.
        """
        ids, segments = prediction["panoptic_seg"]
        ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
        dropped = None
        if self._merging and (found := self._panoptic.found(record)):
            truth = read_ground_truth(record["pan_seg_file_name"])
            dropped = dropped_segments(found.segments, truth, prediction, self._merging)
        return ImagePrediction(
            {key: record[key] for key in ("file_name", "pan_seg_file_name")},
            index_png(ids, [s["id"] for s in segments]),
            {int(s["id"]): _number(s.get("score")) for s in segments},
            dropped,
        )

    def summarize(self, images: Mapping[tuple[Hashable, str], ImagePrediction]) -> None:
        """Write the files."""
        panoptic = self._panoptic
        if not panoptic.images:
            logger.warning("No panoptic quality, so no report is written")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        dropped = [image.dropped for image in images.values()]
        data = self._facts(panoptic) | {"merging": merging_prices(dropped, panoptic.totals())}
        names = _names_of_images(panoptic)
        content = {
            **data,
            "categories": [list(category) for category in panoptic.names],
            "image_counts": _image_counts(panoptic, names),
        }
        (self._folder / "report.json").write_text(json.dumps(plain(content)), "utf-8")

        metadata = MetadataCatalog.get(self._name)
        shown = {
            key: ShownImage.of(image.record, image.png, image.scores, panoptic.images[key])
            for key, image in images.items()
            if key in panoptic.images
        }
        maps = self._folder / NAME
        _, left_out = write_maps(maps, ((names[k], image) for k, image in shown.items()), metadata)
        if left_out:
            logger.warning("%s is full: of %d images it has no map", maps, left_out)
        groups, places = _groups(panoptic, shown)
        pictures = [
            picture({"prediction": shown[k]}, panoptic.names, metadata, _caption(shown[k]))
            for k in places
        ]
        legend = {kind: KIND_TEXTS[kind][0] for kind in KINDS} | {MATCH: "Found"}
        path = self._folder / "report.html"
        write_page(
            path,
            "report.html.jinja",
            pictures=pictures,
            groups=groups,
            legend=legend,
            data=data,
        )
        logger.info("Report written to %s (%.1f MB)", path, path.stat().st_size / 1e6)

    def _facts(self, panoptic: PanopticQualityEvaluator) -> dict[str, Any]:
        """All that is shown but pictures."""
        scores: dict[str, dict[str, float]] = {}
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for evaluator in self._evaluators:
            scores |= evaluator.scores
            is_slow = isinstance(evaluator, InstanceAPEvaluator) and (
                len(evaluator.images) > FEW_IMAGES and not evaluator.scores_intervals
            )
            if evaluator.images and not is_slow:
                intervals |= evaluator.intervals()
        result = panoptic.analysis()
        for entry in result["classes"]:
            for key, task, metric in (("IoU", "sem_seg", "IoU"), ("AP", "segm", "AP")):
                own = metric == "IoU" or entry["isthing"]
                entry[key] = scores.get(task, {}).get(f"{metric}-{entry['name']}") if own else None
        return {
            "dataset": self._name,
            "scores": scores,
            "headlines": [
                {
                    "label": label,
                    "value": scores[task][metric],
                    "interval": intervals.get(task, {}).get(metric),
                }
                for task, metric, label in HEADLINES
                if metric in scores.get(task, {})
            ],
            "analysis": result,
            "confusions": self._confusions(),
            "run": self._run(),
            "config": differences(self._cfg) if self._cfg else [],
            "config_groups": [asdict(group) for group in grouped_differences(self._cfg)]
            if self._cfg
            else [],
        }

    def _confusions(self) -> list[dict[str, Any]]:
        """The pairs of semantic classes with most wrong pixels."""
        semantic = [e for e in self._evaluators if isinstance(e, SemSegIoUEvaluator) and e.images]
        if not semantic:
            return []
        names = list(MetadataCatalog.get(self._name).stuff_classes)
        confusion = semantic[0].confusion()
        wrong = confusion - np.diag(np.diagonal(confusion))
        order = np.argsort(-wrong, axis=None)[:CONFUSIONS]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            {
                "true": names[a],
                "predicted": names[b],
                "share_of_true": 100 * wrong[a, b] / confusion[a].sum(),
                "share_of_wrong": 100 * wrong[a, b] / wrong.sum(),
            }
            for a, b in pairs
            if wrong[a, b]
        ]

    def _run(self) -> dict[str, str]:
        device = self._cfg.MODEL.DEVICE if self._cfg else "unknown"
        if device.startswith("cuda") and torch.cuda.is_available():
            device += f", {torch.cuda.get_device_name()}"
        from .. import __version__

        return {
            "Command": shlex.join(["python", *map(os.path.basename, sys.argv[:1]), *sys.argv[1:]]),
            "Weights": self._cfg.MODEL.WEIGHTS if self._cfg else "",
            "Written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "Evaluation took": f"{time.time() - self._began:.0f} s",
            "Device": device,
            "Versions": f"panoptic_fpn_ext {__version__}, Detectron2 {detectron2.__version__}, "
            f"PyTorch {torch.__version__}, Python {platform.python_version()}",
        }


def _groups(
    panoptic: PanopticQualityEvaluator, shown: Mapping[Any, ShownImage]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Headings with the places of the images under each, and the images that are shown."""
    places: dict[Any, int] = {}
    groups = []
    for title, keys in _chosen(panoptic):
        keys = [key for key in keys if key in shown]
        for key in keys:
            if len(places) < MOST_IMAGES:
                places.setdefault(key, len(places))
        if group := [places[key] for key in keys if key in places]:
            groups.append({"title": title, "images": group})
    return groups, list(places)


def _caption(image: ShownImage) -> str:
    pq = "–" if math.isnan(image.pq) else f"{image.pq:.1f}"
    return f"{os.path.basename(image.file_name)} · PQ {pq}"


def _chosen(panoptic: PanopticQualityEvaluator) -> list[tuple[str, list[Any]]]:
    """Headings, and the images under each."""
    found = panoptic.images
    ranked = sorted(
        (k for k in found if not math.isnan(found[k].pq())), key=lambda k: found[k].pq()
    )
    chosen = [
        (f"Worst {WORST} by PQ of the image", ranked[:WORST]),
        (f"Best {BEST} by PQ of the image", ranked[::-1][:BEST]),
        (f"Random {RANDOM}", random.Random(0).sample(ranked, min(RANDOM, len(ranked)))),
    ]

    # Of each kind and category how many errors which images have.
    counts: dict[Any, Counter] = defaultdict(Counter)
    for key, image in found.items():
        for segment in image.segments:
            if segment.state not in (MATCH, IGNORED):
                counts[segment.state][key] += 1
                counts[segment.category][key] += 1
    titles = {kind: f"Most errors: {KIND_TEXTS[kind][0].lower()}" for kind in KINDS}
    titles |= {category: f"Worst of class: {name}" for category, name in panoptic.names.items()}
    for what, title in titles.items():
        chosen.append((title, [key for key, _ in counts[what].most_common(OF_EACH)]))
    return chosen


def _names_of_images(panoptic: PanopticQualityEvaluator) -> dict[Any, str]:
    """What to call each image: its file below the folder of all."""
    root = os.path.commonpath([os.path.dirname(name) for _, name in panoptic.images])
    return {key: os.path.relpath(key[1], root) for key in panoptic.images}


def _image_counts(panoptic: PanopticQualityEvaluator, names: Mapping[Any, str]) -> list[list[Any]]:
    """Of each image its name, and for each of its categories: place, sum of IoUs, matches, false
    positives, false negatives."""
    place = {category: k for k, category in enumerate(panoptic.names)}
    return [
        [
            names[key],
            [
                [place[c], math.fsum(m.ious), len(m.ious), m.false_positives, m.false_negatives]
                for c, m in image.matches.items()
            ],
        ]
        for key, image in panoptic.images.items()
    ]


def _number(value: Any) -> float | None:
    return None if value is None else round(float(value), 3)
