"""The panoptic matches of one image (https://arxiv.org/abs/1801.00868).

The rules of matching are panopticapi's, which are also those of cityscapesscripts.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .common import check_size
from .panoptic_maps import joint_runs

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


@dataclass(frozen=True)
class SegmentTable:
    """How the segments of a prediction and of its ground truth overlap, in pixels.

    Attributes:
        gt_segments, pred_segments: dicts with ``id``, ``category_id`` and ``isthing``.
        gt_area, pred_area: float64 arrays (G,) and (P,).
        in_void: float64 array (P,): how much of each prediction lies on void.
        intersection, union: float64 arrays (G, P); void is no part of a union.
    """

    gt_segments: Sequence[Mapping[str, Any]]
    pred_segments: Sequence[Mapping[str, Any]]
    gt_area: np.ndarray
    pred_area: np.ndarray
    in_void: np.ndarray
    intersection: np.ndarray
    union: np.ndarray

    @property
    def gt_categories(self) -> list[Category]:
        return [category_of(segment) for segment in self.gt_segments]

    @property
    def pred_categories(self) -> list[Category]:
        return [category_of(segment) for segment in self.pred_segments]


@dataclass(frozen=True)
class Matching:
    """Which segments of a :class:`SegmentTable` match and which are errors; places in its lists.

    Attributes:
        pairs: the true segment of each matched prediction.
        ious: of each pair.
        false_positives: predictions that count and match nothing.
        false_negatives: true segments that no prediction matches.
    """

    pairs: dict[int, int]
    ious: dict[int, float]
    false_positives: list[int]
    false_negatives: list[int]

    def by_category(self, table: SegmentTable) -> dict[Category, CategoryMatches]:
        """The matches of each category that the image counts for."""
        matches: dict[Category, CategoryMatches] = defaultdict(CategoryMatches)
        gt_categories, pred_categories = table.gt_categories, table.pred_categories
        for pred, iou in self.ious.items():
            matches[pred_categories[pred]].ious.append(iou)
        for gt in self.false_negatives:
            matches[gt_categories[gt]].false_negatives += 1
        for pred in self.false_positives:
            matches[pred_categories[pred]].false_positives += 1
        return dict(matches)


def match_segments(
    gt_ids: np.ndarray,
    gt_segments: Sequence[Mapping[str, Any]],
    pred_ids: np.ndarray,
    pred_segments: Sequence[Mapping[str, Any]],
    *,
    gt_source: str = "ground truth",
    pred_source: str = "prediction",
) -> dict[Category, CategoryMatches]:
    """The matches of each category that an image counts for.

    Args, Raises: see :func:`segment_table`; the rules are those of :func:`matching`.
    """
    table = segment_table(
        gt_ids,
        gt_segments,
        pred_ids,
        pred_segments,
        gt_source=gt_source,
        pred_source=pred_source,
    )
    return matching(table).by_category(table)


def segment_table(
    gt_ids: np.ndarray,
    gt_segments: Sequence[Mapping[str, Any]],
    pred_ids: np.ndarray,
    pred_segments: Sequence[Mapping[str, Any]],
    *,
    gt_source: str = "ground truth",
    pred_source: str = "prediction",
) -> SegmentTable:
    """Count how the segments of an image overlap. Areas are counted in the id maps.

    Args:
        gt_ids: integer array (H, W) of segment ids; 0 is void.
        gt_segments: for each true segment ``id``, ``category_id``, ``isthing`` and, for a crowd,
            ``iscrowd``.
        pred_ids: integer array (H, W) of segment ids; 0 and -1 are void.
        pred_segments: for each predicted segment ``id``, ``category_id`` and ``isthing``.
        gt_source, pred_source: what to call the two in errors, such as a file name.

    Raises:
        UserError: the two maps differ in size, or a map and its list differ in segments.
    """
    check_size(pred_source, pred_ids.shape, gt_source, gt_ids.shape)
    gt_values, pred_values, lengths = joint_runs(gt_ids, pred_ids)
    rows = _segment_numbers(gt_values, gt_segments, gt_source, may_be_absent=True)
    columns = _segment_numbers(pred_values, pred_segments, pred_source)

    shape = len(gt_segments) + 1, len(pred_segments) + 1
    pixels = np.bincount(
        rows * shape[1] + columns, weights=lengths, minlength=shape[0] * shape[1]
    ).reshape(shape)
    gt_area = pixels[1:].sum(axis=1)
    pred_area = pixels[:, 1:].sum(axis=0)
    in_void, intersection = pixels[0, 1:], pixels[1:, 1:]
    union = gt_area[:, None] + pred_area - in_void - intersection
    return SegmentTable(
        gt_segments, pred_segments, gt_area, pred_area, in_void, intersection, union
    )


def matching(table: SegmentTable, iou: np.ndarray | None = None) -> Matching:
    """Match the predicted segments of one image to the true ones.

    A predicted and a true segment of one category match where their IoU, void pixels left out of
    the union, is above 0.5. An unmatched prediction is not counted where more than half of it
    lies on void and on the crowd segment of its category; a true segment without a pixel is missed.
    Of several crowd segments of one
    category only the last listed one counts, as in panopticapi.

    Args:
        table: the segments and how they overlap.
        iou: float64 array (G, P) to take in place of the IoU; nowhere above it.
    """
    gt_categories, pred_categories = table.gt_categories, table.pred_categories
    pairs, ious = {}, {}
    for gt, pred in np.argwhere(table.intersection > 0.5 * table.union).tolist():
        if gt_categories[gt] == pred_categories[pred] and not table.gt_segments[gt].get("iscrowd"):
            value = table.intersection[gt, pred] / table.union[gt, pred]
            if iou is not None:
                value = iou[gt, pred]
                if value <= 0.5:
                    continue
            pairs[pred], ious[pred] = gt, float(value)

    crowd, false_negatives, gt_matched = {}, [], set(pairs.values())
    for gt, (segment, category) in enumerate(zip(table.gt_segments, gt_categories, strict=True)):
        if segment.get("iscrowd"):
            crowd[category] = gt
        elif gt not in gt_matched:
            false_negatives.append(gt)

    false_positives = []
    for pred, category in enumerate(pred_categories):
        if pred in pairs:
            continue
        ignored = table.in_void[pred]
        if category in crowd:
            ignored += table.intersection[crowd[category], pred]
        if ignored <= 0.5 * table.pred_area[pred]:
            false_positives.append(pred)
    return Matching(pairs, ious, false_positives, false_negatives)


def category_of(segment: Mapping[str, Any]) -> Category:
    """The category of a segment of ``segments_info``."""
    return bool(segment["isthing"]), segment["category_id"]


def _segment_numbers(
    values: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    source: str,
    *,
    may_be_absent: bool = False,
) -> np.ndarray:
    """Which of ``segments``, counted from 1, each of the ids ``values`` means; 0 is void.

    Raises:
        UserError: a segment lacks a field or shares its id, or ids are only in one of the two
            (unless ``may_be_absent``, in ``segments`` alone).
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
        raise UserError(f"{source}: pixels with ids that segments_info lacks: {_listed(unknown)}")
    if may_be_absent:
        return order[positions]
    found = np.bincount(positions, minlength=len(ids)) > 0
    absent = ids[~found & (ids != 0)]
    if len(absent):
        raise UserError(f"{source}: segments_info has ids that no pixel has: {_listed(absent)}")
    return order[positions]


def _listed(ids: np.ndarray) -> str:
    """The first few of some ids, for an error."""
    ids = np.unique(ids)
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
