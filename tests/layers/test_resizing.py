"""Resizing in one pass against Detectron2's two steps at full resolution."""

import sys
from unittest import mock

import pytest
import torch
from detectron2.modeling.postprocessing import sem_seg_postprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.layers import resizing, trial
from panoptic_fpn_ext.layers.resizing import (
    upsampled,
    upsampled_cross_entropy,
    upsampled_labels,
)

from ..conftest import needs_triton


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    stride=st.sampled_from([1, 4, 8]),
    padding=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    values=st.sampled_from([(1, 1), (5000, 2000), (2**18, 2**22)]),
)
def test_equals_detectron2(seed, grid, stride, padding, size, values):
    logits = torch.randn(5, *grid, generator=torch.Generator().manual_seed(seed))
    image_size = tuple(max(1, n * stride - p) for n, p in zip(grid, padding, strict=True))
    full = F.interpolate(logits[None], scale_factor=stride, mode="bilinear", align_corners=False)
    expected = sem_seg_postprocess(full[0], image_size, *size)
    arguments = {"stride": stride, "image_size": image_size, "size": size}
    with mock.patch.multiple(resizing, BLOCK_VALUES=values[0], BAND_VALUES=values[1]):
        found, labels = upsampled(logits, **arguments)
        assert torch.equal(labels, upsampled_labels(logits, **arguments))
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    top = expected.topk(2, dim=0).values
    certain = top[0] - top[1] > 1e-4  # rounding may turn a tie
    assert torch.equal(labels[certain], expected.argmax(dim=0)[certain])


class LargestTensor(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [
            t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)
        ]
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in given
            ):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return result


def test_large_images_need_memory_for_a_few_rows_only():
    """8 megapixels, 54 classes: all logits would be 1.7 GB."""
    size = (2448, 3264)
    logits = torch.randn(54, size[0] // 4, size[1] // 4)
    with LargestTensor() as largest:
        labels = upsampled_labels(logits, stride=4, image_size=size, size=size)
    assert labels.shape == size
    assert largest.size <= 1.1 * labels.numel() * labels.element_size()


def test_gradients_after_inference_mode():
    """Which leaves nothing behind that autograd refuses."""
    arguments = {"stride": 4, "image_size": (27, 31), "size": (50, 23)}
    logits = torch.randn(5, 7, 8, requires_grad=True)
    with torch.inference_mode():
        expected, labels = upsampled(logits, **arguments)
    found, found_labels = upsampled(logits, **arguments)
    assert_close(found, expected)
    assert torch.equal(found_labels, labels)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert_close(gradient.sum(), torch.tensor(5.0 * 50 * 23))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    stride=st.sampled_from([1, 4]),
    ignored=st.sampled_from([0.0, 0.3, 0.95]),
)
def test_loss_and_gradient_equal_pytorchs(seed, grid, stride, ignored):
    rng = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2, 5, *grid, generator=rng)).requires_grad_()
    size = (2, grid[0] * stride, grid[1] * stride)
    targets = torch.randint(0, 5, size, generator=rng)
    targets[torch.rand(size, generator=rng) < ignored] = 255
    targets[0, 0, 0] = 3  # something counts
    full = F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(full, targets, ignore_index=255)
    (expected_gradient,) = torch.autograd.grad(2 * expected, logits)
    loss = upsampled_cross_entropy(logits, targets, stride=stride, ignore_value=255)
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_as_accurate_in_mixed_precision(dtype):
    logits = torch.randn(2, 5, 12, 16, requires_grad=True)
    targets = torch.randint(0, 5, (2, 48, 64))
    loss = upsampled_cross_entropy(logits, targets, stride=4, ignore_value=255)
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.autocast("cpu", dtype=dtype):
        mixed = upsampled_cross_entropy(logits, targets, stride=4, ignore_value=255)
    (mixed_gradient,) = torch.autograd.grad(mixed, logits)
    assert torch.equal(mixed, loss)
    assert torch.equal(mixed_gradient, gradient)


def test_loss_without_a_pixel_that_counts_is_0():
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    targets = torch.full((1, 16, 16), 255)
    loss = upsampled_cross_entropy(logits, targets, stride=4, ignore_value=255)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("label", [5, 200, -1])
def test_a_label_that_is_no_class_is_an_error(label):
    logits = torch.randn(1, 5, 4, 4)
    targets = torch.zeros(1, 16, 16, dtype=torch.int64)
    targets[0, 3, 4] = label
    with pytest.raises(
        UserError, match=rf"label {label} in sem_seg is neither one of .* 5 classes"
    ):
        upsampled_cross_entropy(logits, targets, stride=4, ignore_value=255)
    loss = upsampled_cross_entropy(logits, targets, stride=4, ignore_value=label)  # is ignored
    full = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    assert_close(loss, F.cross_entropy(full, targets, ignore_index=label))


def test_the_gradient_has_no_gradient_of_its_own():
    """Rather than a wrong one."""
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    loss = upsampled_cross_entropy(
        logits, torch.zeros(1, 16, 16, dtype=torch.int64), stride=4, ignore_value=255
    )
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_other_kinds_of_computing_take_the_plain_operators():
    """Doubles, which have no blocks, tracing and torch.func give the same as blocks of floats."""
    logits = torch.randn(1, 5, 6, 7)
    targets = torch.randint(0, 5, (1, 24, 28))
    targets[0, :5] = 255

    def loss(x):
        return upsampled_cross_entropy(x, targets, stride=4, ignore_value=255)

    expected = loss(logits)
    assert_close(
        torch.func.grad(loss)(logits), torch.autograd.grad(loss(logits.requires_grad_()), logits)[0]
    )
    logits = logits.detach()
    assert_close(torch.jit.trace(loss, logits, check_trace=False)(logits), expected)
    arguments = {"stride": 4, "image_size": (23, 27), "size": (40, 30)}
    values, labels = upsampled(logits[0], **arguments)
    doubles, labels_of_doubles = upsampled(logits[0].double(), **arguments)
    assert_close(doubles.float(), values)
    assert torch.equal(labels_of_doubles, labels)
    assert torch.equal(upsampled_labels(logits[0].double(), **arguments), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_resized_in_full(dtype):
    logits = torch.randn(5, 6, 7).to(dtype)
    arguments = {"stride": 4, "image_size": (23, 27), "size": (40, 30)}
    values, labels = upsampled(logits, **arguments)
    exact, _ = upsampled(logits.float(), **arguments)
    assert values.dtype == dtype
    assert torch.equal(values, exact.to(dtype))
    assert torch.equal(labels, values.float().argmax(dim=0))
    assert torch.equal(upsampled_labels(logits, **arguments), labels)


@pytest.mark.parametrize("fault", ["missing", "wrong", pytest.param(None, marks=needs_triton())])
def test_kernels_are_taken_only_where_they_work(monkeypatch, caplog, fault):
    """As if the CPU were a GPU."""
    kernels = pytest.importorskip("panoptic_fpn_ext.layers.kernels")
    trial._tried_kernels.cache_clear()
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "panoptic_fpn_ext.layers.kernels", None)
        monkeypatch.delattr("panoptic_fpn_ext.layers.kernels")
    elif fault == "wrong":
        monkeypatch.setattr(
            kernels.UpsampledCrossEntropy, "apply", lambda logits, *args: logits.sum()
        )
    for _ in range(2):
        found = trial._tried_kernels(torch.device("cpu"))
        assert found is (None if fault else kernels)
    assert caplog.text.count("Triton kernels do not work on cpu") == bool(fault)
    trial._tried_kernels.cache_clear()
