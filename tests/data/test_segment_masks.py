"""Masks made where they are looked at, against Detectron2's, made beforehand."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext.data.segment_masks import SegmentMasks


@st.composite
def masks(draw: st.DrawFn) -> tuple[SegmentMasks, BitMasks]:
    """Up to 6 masks of a blocky map; some may be empty, some the same."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.uint8, torch.int32]))
    blocks = rng.integers(0, 5, (draw(st.integers(1, 5)), draw(st.integers(1, 6))))
    segments = torch.from_numpy(np.kron(blocks, np.ones((5, 4)))).to(dtype)
    values = torch.from_numpy(rng.integers(0, 7, draw(st.integers(0, 6)))).to(dtype)
    expected = torch.zeros(len(values), *segments.shape, dtype=torch.bool)
    for mask, value in zip(expected, values, strict=True):
        mask[:] = segments == value
    return SegmentMasks(segments, values), BitMasks(expected)


def assert_same(actual: BitMasks, expected: BitMasks) -> None:
    assert isinstance(actual, BitMasks)
    assert len(actual) == len(expected)
    assert tuple(actual.image_size) == tuple(expected.image_size)
    assert actual.tensor.dtype == torch.bool
    assert torch.equal(actual.tensor, expected.tensor)


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(0, 2**31), st.sampled_from([1, 7, 28]), st.booleans())
def test_crops_are_equal_to_the_last_bit(both, seed, mask_size, whole_numbers):
    """Boxes of any size, also of none, and outside the image."""
    actual, expected = both
    rng = np.random.default_rng(seed)
    ends = rng.uniform(-5, 35, (len(actual), 2, 2))
    boxes = np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1).astype(np.float32)
    boxes = torch.from_numpy(boxes.round() if whole_numbers else boxes)
    crops = actual.crop_and_resize(boxes, mask_size)
    assert crops.dtype == torch.bool
    assert crops.shape == (len(boxes), mask_size, mask_size)
    if len(boxes):
        assert torch.equal(crops, expected.crop_and_resize(boxes, mask_size))


@settings(max_examples=40, deadline=None)
@given(masks(), st.data())
def test_everything_else_is_as_of_bitmasks(both, data):
    actual, expected = both
    assert_same(actual, expected)
    assert_same(actual.to("cpu"), expected)
    assert_same(pickle.loads(pickle.dumps(actual)), expected)
    assert actual.device == expected.device
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(actual.nonempty(), expected.nonempty())
    assert torch.equal(actual.get_bounding_boxes().tensor, expected.get_bounding_boxes().tensor)
    assert str(len(expected)) in repr(actual)
    assert_same(SegmentMasks.cat([actual, actual]), BitMasks.cat([expected, expected]))

    places = st.lists(st.integers(-len(actual), len(actual) - 1), max_size=9)
    items = [slice(1, 4), torch.from_numpy(np.arange(len(actual)) % 2 == 0)]
    if len(actual):
        items += [len(actual) - 1, -1, torch.tensor(data.draw(places), dtype=torch.int64)]
    for item in items:
        assert_same(actual[item], expected[item])


def test_instances_hold_them():
    segments = torch.tensor([[1, 1, 2], [3, 3, 2]], dtype=torch.uint8)
    instances = Instances((2, 3))
    instances.gt_masks = SegmentMasks(segments, torch.tensor([3, 2, 1], dtype=torch.uint8))
    chosen = Instances.cat([instances[torch.tensor([2, 0])], instances.to("cpu")[1]])
    expected = [[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]], [[0, 0, 1], [0, 0, 1]]]
    assert chosen.gt_masks.tensor.int().tolist() == expected


def test_a_box_for_each_mask():
    masks = SegmentMasks(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 boxes for 3 masks"):
        masks.crop_and_resize(torch.zeros(2, 4), 7)


def test_selecting_instances_copies_no_map():
    masks = SegmentMasks(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    chosen = masks[torch.zeros(512, dtype=torch.int64)]
    assert chosen.segments.data_ptr() == masks.segments.data_ptr()
