"""Merging against Detectron2's function, and the label spaces it does not know."""

import pytest
import torch
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms, box_iou

from panoptic_fpn_ext.modeling import merge_panoptic


def random_outputs(seed: int, num_instances: int, size=(24, 32), num_classes=5):
    """Overlapping boxes, discs and empty masks, all scores different, and blocks of stuff."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = torch.zeros(num_instances, height, width, dtype=torch.bool)
    for mask in masks:
        cy, cx, r = (torch.rand(3, generator=rng) * torch.tensor([height, width, 12])).tolist()
        mask |= (y - cy) ** 2 + (x - cx) ** 2 < r**2
    instances = Instances(size)
    instances.pred_masks = masks
    instances.scores = (torch.randperm(num_instances, generator=rng) + 0.5) / max(1, num_instances)
    instances.pred_classes = torch.randint(0, 3, (num_instances,), generator=rng)
    blocks = torch.randint(0, num_classes, (height // 4, width // 4), generator=rng)
    return instances, blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)


def merged(instances: Instances, sem_seg: torch.Tensor, **thresholds):
    """Merged with class 0 as things, and thresholds that drop little unless others are given."""
    defaults = {
        "thing_sem_seg_ids": {0},
        "overlap_threshold": 0.5,
        "stuff_area_thresh": 1,
        "instances_score_thresh": 0.5,
    }
    return merge_panoptic(instances, sem_seg, **(defaults | thresholds))


def without_hidden(panoptic_seg: torch.Tensor, segments_info: list[dict]):
    """The same without segments that have no pixel, ids numbered anew."""
    visible = set(panoptic_seg.unique().tolist())
    kept = [segment for segment in segments_info if segment["id"] in visible]
    new_ids = torch.zeros(len(segments_info) + 1, dtype=torch.int32)
    for new_id, segment in enumerate(kept, 1):
        new_ids[segment["id"]] = new_id
    return new_ids[panoptic_seg.long()], [{**s, "id": i} for i, s in enumerate(kept, 1)]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_instances=st.integers(0, 12),
    overlap=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
    area_limit=st.sampled_from([1, 16, 40, 10_000]),
    score=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_equals_detectron2(seed, num_instances, overlap, area_limit, score):
    instances, sem_seg = random_outputs(seed, num_instances)
    expected = combine_semantic_and_instance_outputs(instances, sem_seg, overlap, area_limit, score)
    if overlap == 1:  # where Detectron2's has instances that others hide wholly
        expected = without_hidden(*expected)
    panoptic_seg, segments_info = merged(
        instances,
        sem_seg,
        overlap_threshold=overlap,
        stuff_area_thresh=area_limit,
        instances_score_thresh=score,
    )
    assert panoptic_seg.dtype == torch.int32
    assert segments_info == expected[1]
    assert torch.equal(panoptic_seg, expected[0])


@pytest.mark.parametrize("score", [0.3, 0.7])
def test_a_score_at_the_threshold_counts_as_in_detectron2(score):
    """In single precision 0.7 is less than 0.7, and 0.3 more than 0.3."""
    instances, sem_seg = random_outputs(seed=3, num_instances=4)
    instances.scores = torch.full((4,), score)
    expected = combine_semantic_and_instance_outputs(instances, sem_seg, 0.5, 1, score)
    panoptic_seg, segments_info = merged(instances, sem_seg, instances_score_thresh=score)
    assert segments_info == expected[1]
    assert torch.equal(panoptic_seg, expected[0])


def test_thing_classes_of_the_full_label_space_never_become_stuff():
    instances, sem_seg = random_outputs(seed=1, num_instances=0)
    panoptic_seg, segments_info = merged(instances, sem_seg, thing_sem_seg_ids={1, 3})
    assert {s["category_id"] for s in segments_info} == {0, 2, 4}
    is_thing = (sem_seg == 1) | (sem_seg == 3)
    assert torch.equal(panoptic_seg == 0, is_thing)


def test_an_instance_that_others_hide_wholly_is_no_segment():
    """The third one: what hides it is neither of the others alone."""
    instances, sem_seg = random_outputs(seed=3, num_instances=4)
    instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    instances.pred_masks[:] = False
    for mask, columns in zip(
        instances.pred_masks, [(0, 8), (6, 16), (4, 12), (12, 20)], strict=True
    ):
        mask[:, slice(*columns)] = True
    panoptic_seg, segments_info = merged(
        instances,
        sem_seg,
        overlap_threshold=1.0,
        stuff_area_thresh=10_000,
        instances_score_thresh=0.0,
    )
    assert [(s["id"], s["instance_id"]) for s in segments_info] == [(1, 0), (2, 1), (3, 3)]
    assert panoptic_seg[0].tolist() == [1] * 8 + [2] * 8 + [3] * 4 + [0] * 12


def test_regions_without_a_pixel_are_no_segments():
    instances, sem_seg = random_outputs(seed=2, num_instances=1)
    instances.pred_masks[:] = True
    _, segments_info = merged(instances, sem_seg, stuff_area_thresh=0, instances_score_thresh=0.0)
    assert [s["isthing"] for s in segments_info] == [True]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_instances=st.integers(0, 12),
    nms_thresh=st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]),
    score=st.sampled_from([0.0, 0.4]),
)
def test_suppression_is_nms_over_all_classes_at_once(seed, num_instances, nms_thresh, score):
    """By a plain loop over pairs, and by torchvision with all instances in one class."""
    instances, sem_seg = random_outputs(seed, num_instances)
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_instances, 2, generator=rng) * 12
    sizes = torch.rand(num_instances, 2, generator=rng) * 12 + 1
    boxes = torch.cat([corners, corners + sizes], dim=1)
    instances.pred_boxes = Boxes(boxes)
    thresholds = {
        "thing_sem_seg_ids": {0},
        "overlap_threshold": 0.5,
        "stuff_area_thresh": 1,
        "instances_score_thresh": score,
    }

    iou = box_iou(boxes, boxes)
    survivors: list[int] = []
    for index in instances.scores.argsort(descending=True).tolist():
        if all(iou[index, other] <= nms_thresh for other in survivors):
            survivors.append(index)
    one_class = torch.zeros(num_instances, dtype=torch.int64)
    assert batched_nms(boxes, instances.scores, one_class, nms_thresh).tolist() == survivors

    expected, expected_info = merge_panoptic(instances[survivors], sem_seg, **thresholds)
    for segment in expected_info:
        if segment["isthing"]:
            segment["instance_id"] = survivors[segment["instance_id"]]
    panoptic_seg, segments_info = merge_panoptic(
        instances, sem_seg, nms_thresh=nms_thresh, **thresholds
    )
    assert segments_info == expected_info
    assert torch.equal(panoptic_seg, expected)
