"""What merging drops: segments that PQ misses, although the network had found them.

Of a missed true thing, a detection of its class that is not in the panoptic map and whose whole
mask has an IoU above 0.5 with it; of several that of the greatest. It was dropped by

``score``
    a score below ``INSTANCES_CONFIDENCE_THRESH``, or else by
``overlap``
    ``OVERLAP_THRESH`` (or ``NMS_THRESH``).

Of missed stuff, the pixels of its class in the semantic map that are void in the panoptic one, if
their IoU is above 0.5. They were dropped by

``area``
    ``STUFF_AREA_LIMIT``.

IoU is PQ's: void is no part of a union. Mended, the missed segment is matched with that IoU, and
nothing else changes. So a price is the difference of two PQs, as those of
:mod:`~.panoptic_errors`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from ..config import MERGING_ARCHITECTURES, OUTPUTS
from ..layers.argmax import argmax_classes
from .analysis import IGNORED, MATCH, Segment, after, price
from .panoptic_errors import Change
from .panoptic_matching import Category, CategoryMatches

FEW_PIXELS = 0.1  # of an image: of more the classes of all are found as fast
REASONS = ("score", "overlap", "area")


@dataclass(frozen=True)
class MergingThresholds:
    """What merging goes by.

    Attributes:
        score: ``INSTANCES_CONFIDENCE_THRESH``.
        stuff_area: ``STUFF_AREA_LIMIT``.
    """

    score: float
    stuff_area: float

    @classmethod
    def of_config(cls, cfg: CfgNode) -> "MergingThresholds | None":
        """Those of a model that merges and returns what it has merged, too."""
        keys = cfg.MODEL.PANOPTIC_FPN
        if cfg.MODEL.META_ARCHITECTURE not in (*MERGING_ARCHITECTURES, "PanopticFPN") or set(
            keys.OUTPUTS
        ) != set(OUTPUTS):
            return None
        return cls(keys.COMBINE.INSTANCES_CONFIDENCE_THRESH, keys.COMBINE.STUFF_AREA_LIMIT)


class Dropped(NamedTuple):
    """A missed segment that merging has dropped: its category, one of :data:`REASONS`, and its IoU
    with what was dropped."""

    category: Category
    reason: str
    iou: float


def dropped_segments(
    segments: Iterable[Segment],
    gt_ids: np.ndarray,
    output: Mapping[str, Any],
    thresholds: MergingThresholds,
) -> list[Dropped] | None:
    """What merging has dropped of the missed segments of an image.

    Args:
        segments: of the image, and what became of them.
        gt_ids: integer array (H, W) of the ids of the true ones; 0 is void.
        output: of the model: ``panoptic_seg``, whose things have ``instance_id``; ``instances``
            with ``pred_masks`` (N, H, W); ``sem_seg``, logits (C, H, W) or classes (H, W).
        thresholds: by which it was merged.

    Returns:
        At most one of each missed segment; None if the output does not tell.
    """
    pred_ids, pred_segments = output["panoptic_seg"]
    instances, sem_seg = output.get("instances"), output.get("sem_seg")
    if instances is None or sem_seg is None or not instances.has("pred_masks"):
        return None
    if not isinstance(instances.pred_masks, torch.Tensor):
        return None
    if any(s["isthing"] and "instance_id" not in s for s in pred_segments):
        return None
    missed = [s for s in segments if s.true and s.area and s.state not in (MATCH, IGNORED)]
    present = {s["category_id"] for s in pred_segments if not s["isthing"]}
    things = [s for s in missed if s.category[0]]
    stuff = [s for s in missed if not s.category[0] and s.category[1] not in present]
    found: list[Dropped | None] = []
    if things and len(instances):
        kept = {s["instance_id"] for s in pred_segments if s["isthing"]}
        detections = _Detections(instances, kept, gt_ids > 0)
        found += [detections.dropped(s, gt_ids, thresholds.score) for s in things]
    if stuff:
        void = _numpy(pred_ids) <= 0
        found += _dropped_stuff(stuff, gt_ids, void, sem_seg, thresholds.stuff_area)
    return [entry for entry in found if entry is not None]


class _Detections:
    """The detections that are not in the panoptic map."""

    def __init__(self, instances: Instances, kept: set[int], labelled: np.ndarray) -> None:
        masks = instances.pred_masks
        self._masks = masks.numpy() if masks.device.type == "cpu" else masks
        self._labelled = labelled
        self._scores = instances.scores.tolist()
        self._of_class: dict[int, list[int]] = {}
        for k, category in enumerate(instances.pred_classes.tolist()):
            if k not in kept:
                self._of_class.setdefault(category, []).append(k)

    def dropped(self, segment: Segment, gt_ids: np.ndarray, threshold: float) -> Dropped | None:
        """The one that would have matched a true segment, if there is one."""
        candidates = self._of_class.get(segment.category[1], ())
        if not candidates:
            return None
        true = gt_ids == segment.id
        x, y, width, height = cv2.boundingRect(true.view(np.uint8))
        window = slice(y, y + height), slice(x, x + width)
        true, best, best_iou = true[window], None, 0.5
        if isinstance(self._masks, np.ndarray):  # nothing is copied
            parts = [self._masks[k][window] for k in candidates]
        else:
            parts = _numpy(self._masks[(candidates, *window)])
        common = {
            k: np.count_nonzero(part & true) for k, part in zip(candidates, parts, strict=True)
        }
        # By what its IoU can be at most: few masks are looked at as a whole.
        for k in sorted(candidates, key=common.__getitem__, reverse=True):
            if common[k] <= best_iou * segment.area:
                break
            area = np.count_nonzero(_numpy(self._masks[k]) & self._labelled)
            iou = common[k] / (segment.area + area - common[k])
            if iou > best_iou:
                best, best_iou = k, iou
        if best is None:
            return None
        reason = "score" if self._scores[best] < threshold else "overlap"
        return Dropped(segment.category, reason, best_iou)


def _dropped_stuff(
    segments: Sequence[Segment],
    gt_ids: np.ndarray,
    void: np.ndarray,
    sem_seg: torch.Tensor | np.ndarray,
    limit: float,
) -> list[Dropped]:
    """Stuff whose class has no segment in the panoptic map, which is ``void`` there."""
    found = []
    rest: np.ndarray | None = None  # of the classes of void, which are needed seldom
    for segment in segments:
        if segment.area >= 2 * limit:  # of which more than half would have to be below the limit
            continue
        true = void & (gt_ids == segment.id)
        number = np.count_nonzero(true)
        if 2 * number <= segment.area:
            continue
        if rest is None and number < FEW_PIXELS * void.size:
            common = np.count_nonzero(_classes(sem_seg, true) == segment.category[1])
            if 2 * common <= segment.area:
                continue
        if rest is None:
            rest = _classes(sem_seg, void)
        region = rest == segment.category[1]
        common = np.count_nonzero(region & true[void])
        iou = common / (segment.area + np.count_nonzero(region & (gt_ids[void] > 0)) - common)
        if iou > 0.5 and np.count_nonzero(region) < limit:
            found.append(Dropped(segment.category, "area", iou))
    return found


def _classes(sem_seg: torch.Tensor | np.ndarray, where: np.ndarray) -> np.ndarray:
    """Of ``sem_seg`` the classes of the pixels where a (H, W) mask is."""
    sem_seg = torch.as_tensor(sem_seg)
    if sem_seg.dim() == 2:
        return _numpy(sem_seg)[where]
    if np.count_nonzero(where) > FEW_PIXELS * where.size:
        return _numpy(argmax_classes(sem_seg))[where]
    pixels = torch.from_numpy(np.flatnonzero(where)).to(sem_seg.device)
    return _numpy(sem_seg.flatten(1).index_select(1, pixels).argmax(0))


def merging_prices(
    images: Iterable[Sequence[Dropped] | None], totals: Mapping[Category, CategoryMatches]
) -> dict[str, dict[str, float]] | None:
    """What each reason costs.

    Args:
        images: what was dropped in each; None where that is not known.
        totals: the matches of all images, of each category.

    Returns:
        By reason ``PQ``, ``PQ_th``, ``PQ_st``: how much they would grow, in percent; ``missed``:
        how many segments. None if it is not known of all images.
    """
    changes: dict[str, dict[Category, Change]] = {reason: {} for reason in REASONS}
    counts = dict.fromkeys(REASONS, 0)
    for image in images:
        if image is None:
            return None
        for category, reason, iou in image:
            changes[reason].setdefault(category, Change()).found(iou)
            counts[reason] += 1
    return {
        reason: {**price(totals, after(totals, found)), "missed": counts[reason]}
        for reason, found in changes.items()
    }


def _numpy(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
