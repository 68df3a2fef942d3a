"""Pasting against Detectron2's."""

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
