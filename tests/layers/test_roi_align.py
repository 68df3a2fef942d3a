"""RoIAlign in threads against Detectron2's."""

import copy
import threading
from unittest import mock

import pytest
import torch
from detectron2.layers import ROIAlign
from torch import nn

from panoptic_fpn_ext import accelerate
from panoptic_fpn_ext.layers import roi_align


def boxes(number: int) -> torch.Tensor:
    corners = torch.rand(number, 2) * torch.tensor([150.0, 110.0])
    return torch.cat([torch.arange(number)[:, None] % 2, corners, corners + 20], dim=1)


@pytest.mark.parametrize("number", [0, 1, 3, 50])
def test_equals_detectron2(number, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(roi_align, "MIN_PARALLEL_VALUES", 1)
    threads = []
    plain = ROIAlign.forward

    def noted(*args):
        threads.append(threading.current_thread())
        return plain(*args)

    align = ROIAlign((7, 5), 0.25, 0, aligned=True)
    parallel = accelerate(nn.Sequential(copy.deepcopy(align)))
    x, rois = torch.randn(2, 3, 30, 40), boxes(number)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = align(x, rois)
            with mock.patch.object(ROIAlign, "forward", noted):
                assert torch.equal(parallel[0](x, rois), expected)
        elsewhere = [thread for thread in threads if thread is not threading.main_thread()]
        assert len(elsewhere) == min(number, 3)  # with gradients no more


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_boxes_keep_their_precision(dtype, number, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(roi_align, "MIN_PARALLEL_VALUES", 5 * 3 * 7 * 5)
    align = ROIAlign((7, 5), 0.25, 0, aligned=True)
    parallel = accelerate(nn.Sequential(copy.deepcopy(align)))[0]
    x, rois = torch.randn(2, 3, 30, 40).to(dtype), boxes(number)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = parallel(x, rois)
    expected = align(x.double(), rois).to(dtype)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_a_trace_takes_any_number_of_boxes():
    align = accelerate(ROIAlign((7, 5), 0.25, 0, aligned=True))
    x = torch.randn(2, 64, 30, 40)
    traced = torch.jit.trace(align, (x, boxes(300)))  # enough for threads
    for number in (0, 10, 500):
        rois = boxes(number)
        assert torch.equal(traced(x, rois), align(x, rois))


def test_the_deterministic_mode_compiles_nothing(device, rounding, monkeypatch):
    """torchvision would on GPUs; on CPUs the way around that is only held against Detectron2's."""
    align = ROIAlign((7, 5), 0.25, 0, aligned=True)
    ours = accelerate(nn.Sequential(copy.deepcopy(align)))[0]
    x, rois = torch.randn(2, 3, 30, 40, device=device), boxes(9).to(device)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = align(inputs[0], rois)
    expected.sum().backward()
    monkeypatch.setattr(roi_align, "roi_align", None)
    if device.type == "cpu":
        monkeypatch.setattr(ours, "_would_be_compiled", lambda _: True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = ours(inputs[1], rois)
        found.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, **rounding)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **rounding)
