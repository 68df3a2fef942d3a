"""Merging instances and semantic classes into one panoptic map (paper, section 4 of Panoptic
Segmentation, arXiv:1801.00868; reference: panopticapi's combine script and Detectron2's
``combine_semantic_and_instance_outputs``)."""

import functools
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

from ..layers.pasting import PastedMasks
from ..layers.trial import is_for_kernels, tried

if TYPE_CHECKING:
    from ..layers.mask_bits import MaskBits

PACKED_AT_ONCE = 2**25  # pixels of masks


class Rule(NamedTuple):
    """The arguments of that name of :func:`merge_panoptic`."""

    thing_sem_seg_ids: frozenset[int]
    overlap_threshold: float
    stuff_area_thresh: float
    instances_score_thresh: float
    nms_thresh: float


def merge_panoptic(
    instances: Instances,
    sem_seg: torch.Tensor,
    *,
    thing_sem_seg_ids: Collection[int],
    overlap_threshold: float,
    stuff_area_thresh: int,
    instances_score_thresh: float,
    nms_thresh: float = 1.0,
    num_classes: int | None = None,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Instances by descending score, then stuff where nothing is yet.

    Args:
        instances: ``scores`` (N), ``pred_classes`` (N), ``pred_masks``, an (N, H, W) bool tensor or
            :class:`PastedMasks`, and, for non-maximum suppression, ``pred_boxes``. Where
            :func:`merges_at_once`, ``numbers`` (N) int64 may say what to call each.
        sem_seg: (H, W) int64 semantic classes.
        thing_sem_seg_ids: semantic classes that never become stuff segments.
        overlap_threshold: an instance is dropped if more than this share of it is taken already,
            or all of it.
        stuff_area_thresh: pixels; smaller stuff regions are left void.
        instances_score_thresh: instances below are dropped.
        nms_thresh: instances whose box has a greater IoU with one of a higher score, of
            whatever class, are dropped first; 1 for no suppression.
        num_classes: semantic ones; by default as many as ``sem_seg`` has.

    Returns:
        (H, W) int32 map of segment ids, 0 where void, and ``segments_info``: dicts with ``id``,
        ``isthing``, ``category_id``, and ``score`` and ``instance_id`` (index into ``instances``)
        of things, ``area`` of stuff.
    """
    rule = Rule(
        frozenset(thing_sem_seg_ids),
        overlap_threshold,
        stuff_area_thresh,
        instances_score_thresh,
        nms_thresh,
    )
    if merges_at_once(sem_seg):
        if num_classes is None:
            num_classes = int(sem_seg.max()) + 1
        return _merged_at_once(instances, sem_seg, rule, num_classes=num_classes)
    return _merged_in_turn(instances, sem_seg, rule)


def _merged_in_turn(
    instances: Instances, sem_seg: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """:func:`merge_panoptic`, an instance after the other."""
    panoptic_seg = torch.zeros(sem_seg.shape, dtype=torch.int32, device=sem_seg.device)
    segments_info: list[dict[str, Any]] = []

    by_score = torch.argsort(-instances.scores)  # ties fall as in Detectron2
    # As doubles, or a threshold would be rounded to a score's precision.
    by_score = by_score[instances.scores[by_score].double() >= rule.instances_score_thresh]
    if rule.nms_thresh < 1:
        boxes, scores = instances.pred_boxes.tensor[by_score], instances.scores[by_score]
        by_score = by_score[nms(boxes, scores, rule.nms_thresh)]
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
        accept = (visible_area > 0) & (
            (area - visible_area).double() / area <= rule.overlap_threshold
        )
        panoptic_seg[window] = torch.where(visible & accept, next_id, taken)
        next_id = next_id + accept.int()
        accepted.append(accept)
    if accepted:
        kept = by_score[torch.stack(accepted)]
        scores, classes = instances.scores[kept], instances.pred_classes[kept]
        for instance_id, score, category in zip(
            kept.tolist(), scores.tolist(), classes.tolist(), strict=True
        ):
            _add_thing(segments_info, instance_id, score, category)

    # Class k as k + 1, 0 where an instance is. Counted without weights: deterministic on GPUs.
    stuff = (sem_seg + 1).masked_fill_(panoptic_seg > 0, 0)
    areas = torch.bincount(stuff.flatten()).tolist()
    segment_of_class = panoptic_seg.new_zeros(len(areas))
    for category, area in enumerate(areas[1:]):
        if area == 0 or area < rule.stuff_area_thresh or category in rule.thing_sem_seg_ids:
            continue
        _add_stuff(segments_info, category, area)
        segment_of_class[category + 1] = len(segments_info)
    return panoptic_seg.add_(segment_of_class[stuff]), segments_info


def _merged_at_once(
    instances: Instances, sem_seg: torch.Tensor, rule: Rule, *, num_classes: int
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """:func:`merge_panoptic` on a GPU, which is waited for once, and once more in non-maximum
    suppression; as many launches for many instances as for one."""
    from .merging_kernels import merged_ids  # Triton is not everywhere

    by_score = torch.argsort(-instances.scores)
    if rule.nms_thresh < 1:
        boxes = instances.pred_boxes.tensor[by_score]
        by_score = by_score[nms(boxes, instances.scores[by_score], rule.nms_thresh)]
    scores, classes = instances.scores[by_score], instances.pred_classes[by_score]
    masks = instances.pred_masks
    bits = masks.bits(by_score) if isinstance(masks, PastedMasks) else _packed(masks, by_score)
    kept, ids, areas = merged_ids(
        bits,
        scores.double() >= rule.instances_score_thresh,
        sem_seg,
        overlap_threshold=rule.overlap_threshold,
        num_classes=num_classes,
    )
    is_stuff = (areas > 0) & (areas >= rule.stuff_area_thresh)
    is_stuff &= _is_stuff(rule.thing_sem_seg_ids, num_classes, sem_seg.device)
    stuff_ids = torch.where(is_stuff, is_stuff.cumsum(0) + kept.count_nonzero(), 0).int()
    panoptic_seg = torch.where(ids > 0, ids, stuff_ids[sem_seg])

    numbers = instances.numbers[by_score] if instances.has("numbers") else by_score
    # Together as doubles, which have all of them exactly.
    told = torch.cat([kept, numbers, classes, scores.double(), areas, is_stuff]).tolist()
    told_kept, told_numbers, told_classes, told_scores = (
        told[i * len(kept) : (i + 1) * len(kept)] for i in range(4)
    )
    told_areas, told_is_stuff = told[4 * len(kept) :][:num_classes], told[-num_classes:]
    segments_info: list[dict[str, Any]] = []
    things = zip(told_kept, told_numbers, told_scores, told_classes, strict=True)
    for is_kept, number, score, category in things:
        if is_kept:
            _add_thing(segments_info, int(number), score, int(category))
    for category, (area, stuff) in enumerate(zip(told_areas, told_is_stuff, strict=True)):
        if stuff:
            _add_stuff(segments_info, category, int(area))
    return panoptic_seg, segments_info


def _packed(masks: torch.Tensor, order: torch.Tensor) -> "MaskBits":
    """Some of (N, H, W) masks, chunk by chunk: on the way a pixel takes several bytes."""
    from ..layers.mask_bits import packed_bits

    chunk = max(1, PACKED_AT_ONCE // max(1, masks[0].numel())) if len(masks) else 1
    parts = [packed_bits(masks[indices].bool()) for indices in order.split(chunk)]
    return parts[0]._replace(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("bits", "windows", "areas")
        }
    )


@functools.cache
def _is_stuff(thing_ids: frozenset[int], num_classes: int, device: torch.device) -> torch.Tensor:
    """(num_classes,) bool; on the device once."""
    return torch.tensor([c not in thing_ids for c in range(num_classes)], device=device)


def _add_thing(
    segments_info: list[dict[str, Any]], instance_id: int, score: float, category: int
) -> None:
    segments_info.append(
        {
            "id": len(segments_info) + 1,
            "isthing": True,
            "score": score,
            "category_id": category,
            "instance_id": instance_id,
        }
    )


def _add_stuff(segments_info: list[dict[str, Any]], category: int, area: int) -> None:
    segments_info.append(
        {"id": len(segments_info) + 1, "isthing": False, "category_id": category, "area": area}
    )


def merges_at_once(sem_seg: torch.Tensor) -> bool:
    """Whether :func:`merge_panoptic` has kernels for ``sem_seg``; instances whose box has no area
    do it no harm then."""
    return is_for_kernels(sem_seg) and _kernels_work(sem_seg.device)


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Whether on a small example kernels do what the loop does."""
    return tried(device, _example) is not None


def _example(device: torch.device) -> bool:
    """
    Raises:
        Exception: kernels are missing, or do something else than the loop.
    """
    generator = torch.Generator().manual_seed(0)
    size, number = (40, 70), 40
    instances = Instances(size)
    instances.scores = torch.rand(number, generator=generator).to(device)
    instances.pred_classes = torch.randint(0, 3, (number,), generator=generator).to(device)
    corners = torch.rand(number, 2, generator=generator) * torch.tensor([60.0, 30.0])
    boxes = torch.cat([corners, corners + torch.rand(number, 2, generator=generator) * 30], dim=1)
    probabilities = torch.rand(number, 7, 7, generator=generator).to(device)
    pasted = PastedMasks(probabilities, boxes.to(device), size)
    instances.pred_masks = pasted.bits().unpacked()
    sem_seg = torch.randint(0, 5, size, generator=generator).to(device)
    rule = Rule(frozenset({0}), 0.3, 90, 0.1, 0.9)
    instances.pred_boxes = Boxes(boxes.to(device))
    expected = _merged_in_turn(instances, sem_seg, rule)
    for masks in (instances.pred_masks, pasted):
        instances.pred_masks = masks
        found = _merged_at_once(instances, sem_seg, rule, num_classes=5)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    return True


def _window(
    masks: torch.Tensor | PastedMasks, index: int
) -> tuple[tuple[slice, ...], torch.Tensor]:
    """A part of the image and the mask there; the mask has no pixels elsewhere."""
    if isinstance(masks, PastedMasks):
        return masks.window(index)
    return (slice(None), slice(None)), masks[index].bool()
