"""Merging of any masks, scores and thresholds against panopticapi's rule, pixel by pixel."""

import torch
from detectron2.structures import Instances
from hypothesis import example, given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext.modeling import merge_panoptic

SCORES = [0.0, 0.1, 0.3, 0.5, 0.7, 1.0]
NUM_CLASSES = 5


@st.composite
def outputs(draw) -> tuple[Instances, torch.Tensor]:
    """Masks that are empty, whole, one pixel or noise; equal scores and masks are frequent."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    pixels = st.integers(0, 2 ** (height * width) - 1)
    special = st.sampled_from([0, 1, 2 ** (height * width) - 1, 2 ** (height * width // 2) - 1])
    number = draw(st.integers(0, 6))
    masks = [draw(special | pixels) for _ in range(number)]
    bits = [[mask >> k & 1 for k in range(height * width)] for mask in masks]
    instances = Instances((height, width))
    instances.pred_masks = torch.tensor(bits, dtype=torch.bool).reshape(number, height, width)
    instances.scores = torch.tensor([draw(st.sampled_from(SCORES)) for _ in masks])
    classes = [draw(st.integers(0, 2)) for _ in masks]
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    labels = st.lists(
        st.integers(0, NUM_CLASSES - 1), min_size=height * width, max_size=height * width
    )
    return instances, torch.tensor(draw(labels)).reshape(height, width)


def naive(instances: Instances, sem_seg: torch.Tensor, order: list[int], rule: dict):
    """By Python's sets of pixels."""
    height, width = sem_seg.shape
    everywhere = [(y, x) for y in range(height) for x in range(width)]
    owner: dict[tuple[int, int], int] = {}
    segments = []
    for index in order:
        score = float(instances.scores[index])
        if score < rule["instances_score_thresh"]:
            continue
        mask = {p for p in everywhere if instances.pred_masks[index][p]}
        free = mask - owner.keys()
        if not free or (len(mask) - len(free)) / len(mask) > rule["overlap_threshold"]:
            continue
        category = int(instances.pred_classes[index])
        segments.append({"id": len(segments) + 1, "isthing": True, "score": score})
        segments[-1] |= {"category_id": category, "instance_id": index}
        owner |= dict.fromkeys(free, len(segments))
    for category in range(NUM_CLASSES):
        free = {p for p in everywhere if sem_seg[p] == category} - owner.keys()
        things = rule["thing_sem_seg_ids"]
        if not free or category in things or len(free) < rule["stuff_area_thresh"]:
            continue
        segments.append({"id": len(segments) + 1, "isthing": False, "category_id": category})
        segments[-1]["area"] = len(free)
        owner |= dict.fromkeys(free, len(segments))
    return [[owner.get((y, x), 0) for x in range(width)] for y in range(height)], segments


def whole(number: int) -> tuple[Instances, torch.Tensor]:
    instances = Instances((2, 2))
    instances.pred_masks = torch.ones(number, 2, 2, dtype=torch.bool)
    instances.scores = torch.full((number,), 0.5)
    instances.pred_classes = torch.zeros(number, dtype=torch.int64)
    return instances, torch.ones(2, 2, dtype=torch.int64)


@settings(max_examples=250, deadline=None)
@given(
    outputs(),
    st.sets(st.integers(0, NUM_CLASSES - 1)),
    st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.8, 1.0]),
    st.sampled_from([0, 1, 2, 4, 5, 1000]),
    st.sampled_from(SCORES),
)
@example(whole(0), {0}, 0.5, 1, 0.5)
@example(whole(3), {0}, 1.0, 1, 0.5)
def test_equals_panopticapis_rule(case, things, overlap, area, score):
    instances, sem_seg = case
    given_masks, given_classes = instances.pred_masks.clone(), sem_seg.clone()
    rule = {
        "thing_sem_seg_ids": things,
        "overlap_threshold": overlap,
        "stuff_area_thresh": area,
        "instances_score_thresh": score,
    }
    panoptic_seg, segments = merge_panoptic(instances, sem_seg, **rule)
    # Ties fall as they fall; the scores descend.
    order = torch.argsort(-instances.scores).tolist()
    # What is compared is a single-precision score, as a double.
    expected_seg, expected = naive(instances, sem_seg, order, rule)
    assert panoptic_seg.tolist() == expected_seg
    assert segments == expected
    assert {s["id"] for s in segments} == set(panoptic_seg.unique().tolist()) - {0}
    assert torch.equal(instances.pred_masks, given_masks)
    assert torch.equal(sem_seg, given_classes)
    kept = [segment["score"] for segment in segments if segment["isthing"]]
    assert kept == sorted(kept, reverse=True)
