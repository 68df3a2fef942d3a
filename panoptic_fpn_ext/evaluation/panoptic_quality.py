"""Panoptic quality (https://arxiv.org/abs/1801.00868), counted image by image in memory.

The rules of matching are panopticapi's, which are also those of cityscapesscripts.
"""

import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..errors import UserError
from .common import gather_images, pipe_table
from .panoptic_maps import joint_runs, read_ground_truth

logger = logging.getLogger(__name__)

Category = tuple[bool, int]
"""(isthing, contiguous category_id)"""

_SEGMENT_FIELDS = {"id", "category_id", "isthing"}


@dataclass
class CategoryMatches:
    """Matched and unmatched segments of one category, and the three qualities they give.

    The qualities are fractions, nan where there are no segments at all. The IoUs are kept and
    summed exactly, so that the order in which images are added does not matter.
    """

    ious: list[float] = field(default_factory=list)
    false_positives: int = 0
    false_negatives: int = 0

    def add(self, other: "CategoryMatches") -> None:
        self.ious.extend(other.ious)
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives

    @property
    def true_positives(self) -> int:
        return len(self.ious)

    @property
    def _mean_segments(self) -> float:
        """Mean of the numbers of predicted and of true segments."""
        return self.true_positives + 0.5 * self.false_positives + 0.5 * self.false_negatives

    @property
    def pq(self) -> float:
        return math.fsum(self.ious) / self._mean_segments if self._mean_segments else math.nan

    @property
    def sq(self) -> float:
        if not self._mean_segments:
            return math.nan
        return math.fsum(self.ious) / self.true_positives if self.ious else 0.0

    @property
    def rq(self) -> float:
        return self.true_positives / self._mean_segments if self._mean_segments else math.nan


def match_segments(
    gt_ids: np.ndarray,
    gt_segments: Sequence[Mapping[str, Any]],
    pred_ids: np.ndarray,
    pred_segments: Sequence[Mapping[str, Any]],
    *,
    gt_source: str = "ground truth",
    pred_source: str = "prediction",
) -> dict[Category, CategoryMatches]:
    """Match the predicted segments of one image to the true ones.

    A predicted and a true segment of one category match where their IoU, void pixels left out of
    the union, is above 0.5. An unmatched prediction is not counted where more than half of it
    lies on void and on the crowd segment of its category; of several crowd segments of one
    category only the last listed one counts, as in panopticapi. Areas are counted in the id maps.

    Args:
        gt_ids: integer array (H, W) of segment ids; 0 is void.
        gt_segments: for each true segment ``id``, ``category_id``, ``isthing`` and, for a crowd,
            ``iscrowd``.
        pred_ids: integer array (H, W) of segment ids; 0 and -1 are void.
        pred_segments: for each predicted segment ``id``, ``category_id`` and ``isthing``.
        gt_source, pred_source: what to call the two in errors, such as a file name.

    Returns:
        The matches of each category that the image counts for.

    Raises:
        UserError: the two maps differ in size, or a map and its list differ in segments.
    """
    if gt_ids.shape != pred_ids.shape:
        raise UserError(
            f"{pred_source} is {_size(pred_ids)} pixels (height x width), "
            f"but {gt_source} is {_size(gt_ids)}"
        )
    gt_values, pred_values, lengths = joint_runs(gt_ids, pred_ids)
    rows = _segment_numbers(gt_values, gt_segments, gt_source)
    columns = _segment_numbers(pred_values, pred_segments, pred_source)

    shape = len(gt_segments) + 1, len(pred_segments) + 1
    pixels = np.bincount(
        rows * shape[1] + columns, weights=lengths, minlength=shape[0] * shape[1]
    ).reshape(shape)
    gt_area = pixels[1:].sum(axis=1)
    pred_area = pixels[:, 1:].sum(axis=0)
    in_void, intersection = pixels[0, 1:], pixels[1:, 1:]
    union = gt_area[:, None] + pred_area - in_void - intersection

    gt_categories = [_category(segment) for segment in gt_segments]
    pred_categories = [_category(segment) for segment in pred_segments]
    matches: dict[Category, CategoryMatches] = defaultdict(CategoryMatches)
    gt_matched, pred_matched = set(), set()
    for gt, pred in np.argwhere(intersection > 0.5 * union).tolist():
        if gt_categories[gt] == pred_categories[pred] and not gt_segments[gt].get("iscrowd"):
            iou = float(intersection[gt, pred] / union[gt, pred])
            matches[gt_categories[gt]].ious.append(iou)
            gt_matched.add(gt)
            pred_matched.add(pred)

    crowd = {}
    for gt, (segment, category) in enumerate(zip(gt_segments, gt_categories, strict=True)):
        if segment.get("iscrowd"):
            crowd[category] = gt
        elif gt not in gt_matched:
            matches[category].false_negatives += 1

    for pred, category in enumerate(pred_categories):
        if pred in pred_matched:
            continue
        ignored = in_void[pred]
        if category in crowd:
            ignored += intersection[crowd[category], pred]
        if ignored <= 0.5 * pred_area[pred]:
            matches[category].false_positives += 1
    return dict(matches)


class PanopticQualityEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ of ``panoptic_seg`` against panoptic PNGs.

    Works in one process or several, and gives the same numbers to the last digit however images
    are ordered and spread over processes. An image that comes twice counts once.
    """

    def __init__(
        self,
        *,
        thing_classes: Sequence[str],
        stuff_classes: Sequence[str],
        thing_sem_seg_ids: Sequence[int],
        distributed: bool = True,
    ) -> None:
        """
        Args:
            thing_classes: names of the thing categories.
            stuff_classes: names of the semantic classes.
            thing_sem_seg_ids: semantic class of each thing category; these classes are no stuff
                categories of their own.
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        self._names: dict[Category, str] = {(True, i): n for i, n in enumerate(thing_classes)}
        self._names |= {
            (False, i): n for i, n in enumerate(stuff_classes) if i not in set(thing_sem_seg_ids)
        }
        self._distributed = distributed
        self.reset()

    @classmethod
    def from_dataset(
        cls, dataset_name: str, *, distributed: bool = True
    ) -> "PanopticQualityEvaluator":
        """The evaluator of a registered dataset, from its metadata."""
        metadata = MetadataCatalog.get(dataset_name)
        return cls(
            thing_classes=metadata.thing_classes,
            stuff_classes=metadata.stuff_classes,
            # Detectron2's own panoptic datasets are separated: class 0 is "things".
            thing_sem_seg_ids=metadata.get("thing_sem_seg_ids", (0,)),
            distributed=distributed,
        )

    def reset(self) -> None:
        self._images: dict[Hashable, dict[Category, CategoryMatches]] = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Match the segments of some images.

        Args:
            inputs: dataset dicts with ``file_name``, ``image_id``, ``pan_seg_file_name`` and
                ``segments_info``.
            outputs: dicts with ``panoptic_seg``: integer tensor (H, W) of segment ids, on any
                device, and its ``segments_info``.

        Raises:
            UserError: see :func:`match_segments`; also a segment of an unknown category.
        """
        for record, output in zip(inputs, outputs, strict=True):
            if "pan_seg_file_name" not in record:
                raise UserError(
                    f"{record['file_name']}: no panoptic ground truth; its dataset dict needs "
                    "pan_seg_file_name and segments_info, as register_panoptic_dataset gives them"
                )
            gt_source = record["pan_seg_file_name"]
            pred_source = f"the prediction for {record['file_name']}"
            # Image ids of datasets evaluated together may coincide, their files do not.
            key = record["image_id"], gt_source
            if key in self._images:
                continue
            if "panoptic_seg" not in output:
                raise UserError(f"{pred_source} has no panoptic_seg, only {sorted(output)}")
            pred_ids, pred_segments = output["panoptic_seg"]
            matches = match_segments(
                read_ground_truth(gt_source),
                record["segments_info"],
                _to_numpy(pred_ids),
                pred_segments,
                gt_source=gt_source,
                pred_source=pred_source,
            )
            self._check_categories(record["segments_info"], gt_source)
            self._check_categories(pred_segments, pred_source)
            self._images[key] = matches

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """The panoptic qualities of all images, in percent.

        Returns:
            ``{"panoptic_seg": {...}}`` with ``PQ``, ``SQ``, ``RQ``, the same with ``_th`` and
            ``_st`` for things and stuff, and ``PQ-<name>``, ``SQ-<name>``, ``RQ-<name>`` for each
            category. Averages are over the categories that have a segment, true or predicted;
            a category or an average without any is nan (panopticapi has 0 for such a category
            and fails for such an average). None in all processes but the first.
        """
        images = gather_images(self._images, distributed=self._distributed)
        if images is None:
            return None

        totals = {category: CategoryMatches() for category in self._names}
        for matches in images.values():
            for category, of_image in matches.items():
                totals[category].add(of_image)

        splits = {
            "All": list(totals.values()),
            "Things": [total for (isthing, _), total in totals.items() if isthing],
            "Stuff": [total for (isthing, _), total in totals.items() if not isthing],
        }
        summary = [_average(name, split) for name, split in splits.items()]
        result: dict[str, float] = {}
        for suffix, (_, pq, sq, rq, _) in zip(("", "_th", "_st"), summary, strict=True):
            result |= {f"PQ{suffix}": pq, f"SQ{suffix}": sq, f"RQ{suffix}": rq}
        for metric in ("PQ", "SQ", "RQ"):
            for category, total in totals.items():
                result[f"{metric}-{self._names[category]}"] = 100 * getattr(total, metric.lower())

        self._log(len(images), summary, totals)
        return OrderedDict({"panoptic_seg": result})

    def _check_categories(self, segments: Iterable[Mapping[str, Any]], source: str) -> None:
        for segment in segments:
            if _category(segment) not in self._names:
                kind = "thing" if segment["isthing"] else "stuff"
                raise UserError(
                    f"{source}: segment {segment['id']} has category_id {segment['category_id']}, "
                    f"which is no {kind} category of the dataset"
                )

    def _log(
        self,
        num_images: int,
        summary: list[tuple[str, float, float, float, int]],
        totals: Mapping[Category, CategoryMatches],
    ) -> None:
        logger.info(
            f"Panoptic Evaluation Results on {num_images} images:\n"
            + pipe_table(["", "PQ", "SQ", "RQ", "#categories"], summary)
        )
        rows = [
            (
                self._names[category],
                *(100 * quality for quality in (total.pq, total.sq, total.rq)),
                *(total.true_positives, total.false_positives, total.false_negatives),
            )
            for category, total in totals.items()
        ]
        logger.info(
            "Per-category Panoptic Evaluation Results:\n"
            + pipe_table(["category", "PQ", "SQ", "RQ", "TP", "FP", "FN"], rows)
        )


def _segment_numbers(
    values: np.ndarray, segments: Sequence[Mapping[str, Any]], source: str
) -> np.ndarray:
    """Which of ``segments``, counted from 1, each of the ids ``values`` means; 0 is void.

    Raises:
        UserError: a segment lacks a field or shares its id, or ids are only in one of the two.
    """
    for segment in segments:
        if missing := _SEGMENT_FIELDS - segment.keys():
            raise UserError(f"{source}: segments_info: {dict(segment)} has no {min(missing)}")
    ids = np.array([0, *(segment["id"] for segment in segments)], dtype=np.int64)
    order = np.argsort(ids)
    ids = ids[order]
    if ids[0] < 0 or (ids[1:] == ids[:-1]).any():
        raise UserError(
            f"{source}: ids in segments_info must be positive and differ, but they are "
            + ", ".join(str(segment["id"]) for segment in segments)
        )
    values = np.where(values == -1, 0, values)
    positions = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
    unknown = values[ids[positions] != values]
    if len(unknown):
        raise UserError(f"{source}: pixels with ids that segments_info lacks: {_some(unknown)}")
    found = np.bincount(positions, minlength=len(ids)) > 0
    absent = ids[~found & (ids != 0)]
    if len(absent):
        raise UserError(f"{source}: segments_info has ids that no pixel has: {_some(absent)}")
    return order[positions]


def _average(name: str, split: Sequence[CategoryMatches]) -> tuple[str, float, float, float, int]:
    """Row of the summary: name, PQ, SQ and RQ in percent, number of categories with segments."""
    present = [total for total in split if not math.isnan(total.pq)]
    if not present:
        if split:
            logger.warning(f"Panoptic quality of {name}: no segments to evaluate, so it is nan")
        return name, math.nan, math.nan, math.nan, 0
    means = (
        100 * math.fsum(getattr(total, metric) for total in present) / len(present)
        for metric in ("pq", "sq", "rq")
    )
    return name, *means, len(present)


def _category(segment: Mapping[str, Any]) -> Category:
    return bool(segment["isthing"]), segment["category_id"]


def _to_numpy(ids: torch.Tensor | np.ndarray) -> np.ndarray:
    return ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)


def _some(ids: np.ndarray) -> str:
    """Ids for an error: the first few."""
    ids = np.unique(ids)
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")


def _size(ids: np.ndarray) -> str:
    return " x ".join(map(str, ids.shape))
