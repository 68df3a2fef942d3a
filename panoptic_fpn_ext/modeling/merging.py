"""Merging instances and semantic classes into one panoptic map (paper, section 4 of Panoptic
Segmentation, arXiv:1801.00868; reference: panopticapi's combine script and Detectron2's
``combine_semantic_and_instance_outputs``)."""

from collections.abc import Collection
from typing import Any

import torch
from detectron2.structures import Instances
from torchvision.ops import nms

from ..layers.pasting import PastedMasks


def merge_panoptic(
    instances: Instances,
    sem_seg: torch.Tensor,
    *,
    thing_sem_seg_ids: Collection[int],
    overlap_threshold: float,
    stuff_area_thresh: int,
    instances_score_thresh: float,
    nms_thresh: float = 1.0,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Instances by descending score, then stuff where nothing is yet.

    Args:
        instances: ``scores`` (N), ``pred_classes`` (N), ``pred_masks``, an (N, H, W) bool tensor or
            :class:`PastedMasks`, and, for non-maximum suppression, ``pred_boxes``.
        sem_seg: (H, W) int64 semantic classes.
        thing_sem_seg_ids: semantic classes that never become stuff segments.
        overlap_threshold: an instance is dropped if more than this share of it is taken already,
            or all of it.
        stuff_area_thresh: pixels; smaller stuff regions are left void.
        instances_score_thresh: instances below are dropped.
        nms_thresh: instances whose box has a greater IoU with one of a higher score, of
            whatever class, are dropped first; 1 for no suppression.

    Returns:
        (H, W) int32 map of segment ids, 0 where void, and ``segments_info``: dicts with ``id``,
        ``isthing``, ``category_id``, and ``score`` and ``instance_id`` (index into ``instances``)
        of things, ``area`` of stuff.
    """
    panoptic_seg = torch.zeros(sem_seg.shape, dtype=torch.int32, device=sem_seg.device)
    segments_info: list[dict[str, Any]] = []

    by_score = torch.argsort(-instances.scores)  # ties fall as in Detectron2
    # As doubles, or a threshold would be rounded to a score's precision.
    by_score = by_score[instances.scores[by_score].double() >= instances_score_thresh]
    if nms_thresh < 1:
        boxes, scores = instances.pred_boxes.tensor[by_score], instances.scores[by_score]
        by_score = by_score[nms(boxes, scores, nms_thresh)]
    # Each decision stays on the device: nothing waits for it until all are made.
    next_id = panoptic_seg.new_ones(())
    accepted = []
    for index in by_score.tolist():
        window, mask = _window(instances.pred_masks, index)
        taken = panoptic_seg[window]
        area = mask.count_nonzero()  # sum() would copy it as int64
        visible = mask & (taken == 0)
        visible_area = visible.count_nonzero()
        # Without a visible pixel it is no segment, not even where all may overlap.
        accept = (visible_area > 0) & ((area - visible_area).double() / area <= overlap_threshold)
        panoptic_seg[window] = torch.where(visible & accept, next_id, taken)
        next_id = next_id + accept.int()
        accepted.append(accept)
    if accepted:
        kept = by_score[torch.stack(accepted)]
        scores, classes = instances.scores[kept], instances.pred_classes[kept]
        for instance_id, score, category in zip(
            kept.tolist(), scores.tolist(), classes.tolist(), strict=True
        ):
            segments_info.append(
                {
                    "id": len(segments_info) + 1,
                    "isthing": True,
                    "score": score,
                    "category_id": category,
                    "instance_id": instance_id,
                }
            )

    # Class k as k + 1, 0 where an instance is. Counted without weights: deterministic on GPUs.
    stuff = (sem_seg + 1).masked_fill_(panoptic_seg > 0, 0)
    areas = torch.bincount(stuff.flatten()).tolist()
    segment_of_class = panoptic_seg.new_zeros(len(areas))
    for category, area in enumerate(areas[1:]):
        if area == 0 or area < stuff_area_thresh or category in thing_sem_seg_ids:
            continue
        segments_info.append(
            {
                "id": len(segments_info) + 1,
                "isthing": False,
                "category_id": category,
                "area": area,
            }
        )
        segment_of_class[category + 1] = len(segments_info)
    return panoptic_seg.add_(segment_of_class[stuff]), segments_info


def _window(
    masks: torch.Tensor | PastedMasks, index: int
) -> tuple[tuple[slice, ...], torch.Tensor]:
    """A part of the image and the mask there; the mask has no pixels elsewhere."""
    if isinstance(masks, PastedMasks):
        return masks.window(index)
    return (slice(None), slice(None)), masks[index].bool()
