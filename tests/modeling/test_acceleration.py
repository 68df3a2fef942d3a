"""Accelerated modules against the ones they stand in for."""

import copy
import threading
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from detectron2.layers import (
    Conv2d,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ROIAlign,
    ShapeSpec,
)
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from hypothesis import assume, example, given, settings
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from panoptic_fpn_ext.modeling import acceleration
from panoptic_fpn_ext.modeling.acceleration import accelerate, convolve


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def pair(request):
    """A network with frozen batch norm, and its accelerated copy."""
    network = nn.Sequential(
        Conv2d(3, 8, 3, padding=1, bias=request.param, norm=FrozenBatchNorm2d(8)),
        Conv2d(
            8,
            8,
            3,
            stride=2,
            groups=2,
            bias=False,
            norm=FrozenBatchNorm2d(8),
            activation=torch.relu,
        ),
        nn.Conv2d(8, 4, 1),
        Conv2d(4, 4, 3, padding=1, norm=nn.GroupNorm(2, 4), activation=torch.relu),
    )
    randomize(network)
    accelerated = copy.deepcopy(network)
    accelerate(accelerated, fold_batch_norm=True, winograd=True)
    return network, accelerated


def randomize(network):
    for name, value in network.state_dict().items():
        if "running_var" in name:
            value.copy_(torch.rand_like(value) + 0.5)
        elif value.is_floating_point():
            value.normal_()


def test_outputs_and_gradients_are_equal(pair):
    x = torch.randn(2, 3, 16, 20)
    outputs = [network(x) for network in pair]
    assert_close(*outputs, atol=1e-4, rtol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    gradients = [{k: p.grad for k, p in network.named_parameters()} for network in pair]
    assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_state_dicts_are_equal(pair):
    assert_close(pair[1].state_dict(), pair[0].state_dict())


@torch.no_grad()
def test_changed_weights_are_folded_anew(pair):
    network, accelerated = pair
    x = torch.randn(2, 3, 16, 20)
    accelerated(x)
    randomize(network)
    accelerated.load_state_dict(network.state_dict())
    assert_close(accelerated(x), network(x), atol=1e-4, rtol=1e-4)


def test_frozen_weights_are_folded_once(pair):
    accelerated = pair[1].requires_grad_(False)
    x = torch.randn(2, 3, 16, 20)
    accelerated(x)
    folded = accelerated[0].folded
    accelerated(x)
    assert accelerated[0].folded is folded is not None


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm])
def test_batch_norm_is_folded_out_of_training_only(norm):
    network = nn.Sequential(Conv2d(3, 8, 3, bias=False, norm=norm(8), activation=torch.relu))
    randomize(network)
    accelerated = copy.deepcopy(network)
    accelerate(accelerated, fold_batch_norm=True, winograd=False)
    for _ in range(2):  # the second time after it has learned more
        if norm is not nn.SyncBatchNorm:  # trains on GPUs only
            x = torch.randn(2, 3, 16, 20)
            assert_close(accelerated.train()(x), network.train()(x))
            assert_close(accelerated.state_dict(), network.state_dict())
        network.eval()
        accelerated.eval()
        with torch.no_grad(), mock.patch.object(accelerated[0].norm, "forward") as norm_forward:
            x = torch.randn(2, 3, 16, 20)
            assert_close(accelerated(x), network(x), atol=1e-4, rtol=1e-4)
        norm_forward.assert_not_called()


@pytest.mark.parametrize("kind", [{"affine": False}, {"track_running_stats": False}])
def test_other_batch_norm_stays(kind):
    network = nn.Sequential(Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8, **kind))).eval()
    randomize(network)
    accelerated = copy.deepcopy(network)
    accelerate(accelerated, fold_batch_norm=True, winograd=False)
    x = torch.randn(2, 3, 16, 20)
    assert_close(accelerated(x), network(x), atol=1e-4, rtol=1e-4)


SHAPES = st.tuples(
    st.sampled_from([1, 2, 33]),
    st.sampled_from([3, 64, 96]),
    st.integers(0, 80),
    st.integers(0, 80),
)


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    channels=st.sampled_from([1, 64, 80]),
    kernel=st.sampled_from([1, 3]),
    padding=st.sampled_from([0, 1]),
    stride=st.sampled_from([1, 1, 2]),
    has_bias=st.booleans(),
    channels_last=st.booleans(),
)
@example((1, 64, 1, 2100), 64, 3, 1, 1, True, False)
@example((1, 64, 4200, 1), 64, 3, 1, 1, True, False)
@example((2, 64, 260, 270), 64, 3, 1, 1, True, True)  # several pieces of an image
@example((400, 64, 14, 14), 64, 3, 1, 1, False, False)  # several pieces of a batch
@example((2, 64, 70, 70), 80, 1, 0, 1, True, False)
@example((2, 64, 91, 99), 80, 1, 0, 2, True, False)
def test_convolutions_and_their_gradients_are_equal(
    shape, channels, kernel, padding, stride, has_bias, channels_last
):
    # There PyTorch 2.14's own weight gradient on two threads is wrong, or never comes.
    assume(not (channels_last and kernel == 1 and stride == 2))
    number, in_channels, height, width = shape
    height, width = max(height, kernel), max(width, kernel if padding == 0 else 1)
    torch.manual_seed(0)
    x = torch.randn(number, in_channels, height, width)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, in_channels, kernel, kernel) / (kernel * in_channels**0.5)
    tensors = [x, weight, *([torch.randn(channels)] if has_bias else [])]
    settings = (stride, stride), (padding, padding), (1, 1), 1
    results = []
    for run in (convolve, F.conv2d):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        output = run(*inputs, *([] if has_bias else [None]), *settings)
        results.append([output, *torch.autograd.grad(output.square().mean(), inputs)])
    for ours, expected in zip(*results, strict=True):
        limit = 1e-4 * max(1e-6, float(expected.detach().abs().max()))
        assert_close(ours, expected, atol=limit, rtol=0)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_compilers_see_one_graph_of_plain_convolutions(norm):
    network = nn.Sequential(Conv2d(64, 64, 3, padding=1, norm=norm(64))).eval()
    randomize(network)
    accelerated = copy.deepcopy(network)
    accelerate(accelerated, fold_batch_norm=True, winograd=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(accelerated, fullgraph=True, backend=backend)
    x = torch.randn(1, 64, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            assert_close(compiled(x), network(x), atol=1e-4, rtol=1e-4)
            randomize(network)
            accelerated.load_state_dict(network.state_dict())
    assert len(graphs) == 1
    assert "nnpack" not in graphs[0]


def test_tracing_takes_the_plain_convolution():
    network = nn.Sequential(Conv2d(64, 64, 3, padding=1))
    accelerate(network, fold_batch_norm=True, winograd=True)
    x = torch.randn(1, 64, 64, 64)
    traced = torch.jit.trace(network, x, check_trace=False)
    assert "nnpack" not in str(traced.inlined_graph)
    assert_close(traced(x), network(x), atol=1e-4, rtol=1e-4)


def test_other_precisions_take_the_plain_convolution():
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    settings = (1, 1), (1, 1), (1, 1), 1
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(x, weight, None, *settings).dtype == torch.bfloat16
    double = convolve(x.double(), weight.double(), None, *settings)
    assert_close(double, F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("number", [0, 1, 70])
def test_mask_logits_are_equal(number):
    shape = ShapeSpec(channels=8, height=14, width=14)
    head = MaskRCNNConvUpsampleHead(shape, num_classes=3, conv_dims=[8, 8, 8])
    lean = copy.deepcopy(head)
    accelerate(lean, fold_batch_norm=False, winograd=False)
    x = torch.randn(number, 8, 14, 14)
    for module in (head, lean):
        module.eval()
    with torch.no_grad():
        assert_close(lean.layers(x), head.layers(x), atol=1e-5, rtol=1e-5)
    assert_close(lean.train().layers(x), head.train().layers(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 3, 50])
def test_roi_align_is_equal(number, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(acceleration, "ROI_ALIGN_MIN_WORK", 1)
    threads = []
    plain = ROIAlign.forward

    def noted(*args):
        threads.append(threading.current_thread())
        return plain(*args)

    align = ROIAlign((7, 5), 0.25, 0, aligned=True)
    parallel = nn.Sequential(copy.deepcopy(align))
    accelerate(parallel, fold_batch_norm=False, winograd=False)
    x = torch.randn(2, 3, 30, 40)
    corners = torch.rand(number, 2) * torch.tensor([150.0, 110.0])
    rois = torch.cat([torch.arange(number)[:, None] % 2, corners, corners + 20], dim=1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = align(x, rois)
            with mock.patch.object(ROIAlign, "forward", noted):
                assert torch.equal(parallel[0](x, rois), expected)
        elsewhere = [thread for thread in threads if thread is not threading.main_thread()]
        assert len(elsewhere) == min(number, 3)  # with gradients no more


@pytest.mark.parametrize("conv_dims", [[-1], [-1, 12, 16]])
@pytest.mark.parametrize("height", [1, 8, 9, 41])
def test_proposals_of_strips_are_equal(monkeypatch, conv_dims, height):
    monkeypatch.setattr(acceleration, "WINOGRAD_MAX_PIXELS", 60)
    monkeypatch.setattr(acceleration, "WINOGRAD_STRIP_PIXELS", 32)
    head = StandardRPNHead(in_channels=16, num_anchors=3, conv_dims=conv_dims)
    randomize(head)
    lean = nn.Sequential(copy.deepcopy(head))
    accelerate(lean, fold_batch_norm=False, winograd=True)
    features = [torch.randn(2, 16, height, 8), torch.randn(2, 16, 3, 5)]
    strips = []
    lean[0].objectness_logits.register_forward_hook(lambda *args: strips.append(args[1][0]))
    for grad in (True, False):
        strips.clear()
        with torch.set_grad_enabled(grad):
            assert_close(lean[0](features), head(features), atol=1e-4, rtol=1e-4)
        in_strips = not grad and height > 7 and torch.backends.nnpack.is_available()
        assert (len(strips) > 2) == in_strips
        if in_strips:  # each of 4 rows, and those beside it that the convolutions reach
            assert max(strip.shape[2] for strip in strips) <= 4 + 2 * len(conv_dims)


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="PyTorch without NNPACK")
@pytest.mark.parametrize(("winograd", "side"), [(True, 64), (True, 8), (False, 64)])
def test_large_convolutions_take_winograds_algorithm(winograd, side):
    network = nn.Sequential(Conv2d(64, 64, 3, padding=1))
    accelerate(network, fold_batch_norm=False, winograd=winograd)
    with torch.no_grad(), torch.profiler.profile() as profiler:
        network(torch.randn(1, 64, side, side))
    took_it = any("_nnpack_spatial" in event.key for event in profiler.key_averages())
    assert took_it == (winograd and side == 64)
