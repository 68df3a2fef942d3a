"""Triton kernels against PyTorch's operators in float64; on CPUs by Triton's interpreter."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed")

from panoptic_fpn_ext.layers import kernels  # tests/conftest.py has it interpreted on CPUs

from ..conftest import needs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [needs_triton(), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


def plain_loss(logits, targets, stride, ignore_value):
    full = F.interpolate(logits.double(), scale_factor=stride, mode="bilinear", align_corners=False)
    total = F.cross_entropy(full, targets, ignore_index=ignore_value, reduction="sum")
    return total / (targets != ignore_value).sum().clamp(min=1)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 2),
    num_classes=st.sampled_from([2, 3, 19]),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.sampled_from([1, 2, 3, 4]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
)
@example(0, 1, 2, (1, 1), 8, 0.0, False, torch.float32)
@example(1, 1, 2, (3, 2), 8, 0.2, False, torch.float32)
@example(2, 1, 255, (3, 5), 2, 0.5, True, torch.float32)
@example(3, 2, 54, (6, 7), 4, 0.5, True, torch.float32)
def test_loss_and_gradient(
    seed, num_images, num_classes, grid, stride, ignored, channels_last, dtype
):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_images, num_classes, *grid, generator=generator)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    logits = logits.to(DEVICE, dtype).requires_grad_()
    size = (num_images, grid[0] * stride, grid[1] * stride)
    targets = torch.randint(0, num_classes, size, generator=generator)
    targets[torch.rand(size, generator=generator) < ignored] = 255
    targets = targets.to(DEVICE)
    expected = plain_loss(logits, targets, stride, 255)
    (expected_gradient,) = torch.autograd.grad(2 * expected, logits)
    loss = kernels.UpsampledCrossEntropy.apply(logits, targets, stride, 255)
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    limits = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    assert gradient.dtype == dtype
    assert_close(gradient, expected_gradient, **limits)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@example(0, 255, (5, 4), 4, (3, 0), (13, 29))
@given(
    seed=st.integers(0, 2**31),
    num_classes=st.sampled_from([2, 19]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.sampled_from([1, 2, 4, 8]),
    padding=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_labels(seed, num_classes, grid, stride, padding, size):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_classes, *grid, generator=generator).to(DEVICE)
    image_size = tuple(max(1, n * stride - p) for n, p in zip(grid, padding, strict=True))
    full = F.interpolate(
        logits[None].double(), scale_factor=stride, mode="bilinear", align_corners=False
    )
    full = full[:, :, : image_size[0], : image_size[1]]
    full = F.interpolate(full, size=size, mode="bilinear", align_corners=False)[0]
    labels = kernels.upsampled_labels(logits, stride=stride, image_size=image_size, size=size)
    top = full.topk(2, dim=0).values
    certain = top[0] - top[1] > 1e-5
    assert labels.shape == size
    assert torch.equal(labels[certain], full.argmax(dim=0)[certain])


def test_the_first_of_equal_classes_is_taken():
    logits = torch.zeros(4, 3, 3, device=DEVICE)
    arguments = {"stride": 4, "image_size": (12, 12), "size": (20, 9)}
    assert not kernels.upsampled_labels(logits, **arguments).any()
    logits[2:] = 1
    assert (kernels.upsampled_labels(logits, **arguments) == 2).all()
