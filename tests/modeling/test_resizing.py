"""Resizing in one pass against Detectron2's two steps at full resolution."""

import torch
from detectron2.modeling.postprocessing import sem_seg_postprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from panoptic_fpn_ext.modeling.resizing import upsampled, upsampled_labels


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    stride=st.sampled_from([1, 4, 8]),
    padding=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_equals_detectron2(seed, grid, stride, padding, size):
    logits = torch.randn(5, *grid, generator=torch.Generator().manual_seed(seed))
    image_size = tuple(max(1, n * stride - p) for n, p in zip(grid, padding, strict=True))
    full = F.interpolate(logits[None], scale_factor=stride, mode="bilinear", align_corners=False)
    expected = sem_seg_postprocess(full[0], image_size, *size)
    arguments = {"stride": stride, "image_size": image_size, "size": size}
    assert_close(upsampled(logits, **arguments), expected, atol=1e-5, rtol=1e-5)

    labels = upsampled_labels(logits, **arguments)
    top = expected.topk(2, dim=0).values
    certain = top[0] - top[1] > 1e-4  # rounding may turn a tie
    assert torch.equal(labels[certain], expected.argmax(dim=0)[certain])


def test_large_images_need_memory_for_a_few_rows_only():
    """8 megapixels, 54 classes: all logits would be 1.7 GB."""
    logits = torch.randn(54, 50, 80)
    labels = upsampled_labels(logits, stride=4, image_size=(200, 320), size=(2448, 3264))
    assert labels.shape == (2448, 3264)
