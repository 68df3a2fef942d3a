"""Pasting against Detectron2's."""

import pytest
import torch
from detectron2.layers import paste_masks_in_image
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext.layers.pasting import PastedMasks


def random_boxes(rng, count, height, width):
    """Of all sizes: one pixel and less, as large as the image, over its border."""
    start = torch.rand(count, 2, generator=rng) * torch.tensor([width, height])
    extent = torch.rand(count, 2, generator=rng) ** 3 * torch.tensor([width, height]) + 0.01
    return torch.cat([start, torch.minimum(start + extent, torch.tensor([width, height]))], dim=1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 6),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    resolution=st.sampled_from([1, 7, 28]),
)
def test_equals_detectron2(seed, count, height, width, resolution):
    rng = torch.Generator().manual_seed(seed)
    boxes = random_boxes(rng, count, height, width)
    probabilities = torch.rand(count, resolution, resolution, generator=rng)
    expected = paste_masks_in_image(probabilities, boxes, (height, width)).bool()
    pasted = PastedMasks(probabilities, boxes, (height, width))
    # Rounding may turn a pixel that is at the threshold.
    values = paste_masks_in_image(probabilities, boxes, (height, width), threshold=-1)
    certain = (values.int() - 127).abs() > 1
    windows = [pasted.window(index) for index in range(count)]
    assert pasted.dense().shape == (count, height, width)
    assert torch.equal(pasted.dense()[certain], expected[certain])
    for index, (where, mask) in enumerate(windows):
        outside = pasted.dense()[index].clone()
        outside[where] = False
        assert torch.equal(mask, pasted.dense()[index][where])
        assert not outside.any()
        assert pasted.window(index)[0] == where
        assert torch.equal(pasted.window(index)[1], mask)


def test_boxes_outside_the_image_have_no_pixels():
    boxes = torch.tensor([[-30.0, 5, -10, 20], [200.0, 5, 220, 20], [5.0, 90, 20, 95]])
    assert not PastedMasks(torch.ones(3, 28, 28), boxes, (50, 60)).dense().any()


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
def test_one_pixel_around_a_box_belongs_to_its_window(threshold):
    """Where low thresholds let masks reach beyond their boxes."""
    boxes = torch.tensor([[10.0, 12, 30, 40], [10.4, 12.6, 30.4, 40.6], [0.2, 0.3, 49.5, 59.6]])
    probabilities = torch.ones(3, 2, 2)
    expected = paste_masks_in_image(probabilities, boxes, (60, 50), threshold).bool()
    assert torch.equal(PastedMasks(probabilities, boxes, (60, 50), threshold).dense(), expected)


def test_a_probability_at_the_threshold_is_in_the_mask():
    boxes = torch.tensor([[8.0, 8, 24, 24]])
    probabilities = torch.full((1, 4, 4), 0.5)
    expected = paste_masks_in_image(probabilities, boxes, (32, 32)).bool()
    assert expected.sum() > 100
    assert torch.equal(PastedMasks(probabilities, boxes, (32, 32)).dense(), expected)


def test_a_box_without_extent_is_pasted_as_by_detectron2():
    boxes = torch.tensor([[10.0, 12, 10, 40], [10.5, 12.5, 10.5, 12.5]])
    probabilities = torch.ones(2, 4, 4)
    pasted = PastedMasks(probabilities, boxes, (60, 50)).dense()
    assert torch.equal(pasted, paste_masks_in_image(probabilities, boxes, (60, 50)).bool())
