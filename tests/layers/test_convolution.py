"""Convolutions against those they stand in for."""

import contextlib
import copy
import functools
import io
import math
import platform
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from hypothesis import assume, example, given, settings
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from panoptic_fpn_ext import accelerate
from panoptic_fpn_ext.layers import convolution
from panoptic_fpn_ext.layers.convolution import convolve, has_winograd

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
needs_nnpack = pytest.mark.skipif(
    not has_winograd(torch.zeros(1).detach()) and not torch.backends.nnpack.is_available(),
    reason="PyTorch without NNPACK",
)


@pytest.fixture(autouse=True, scope="module")
def other_ways():
    """Whatever this machine is faster at, what can be convolved otherwise than directly is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "WORTH_MEASURING", 0)
        patch.setattr(convolution, "fastest", lambda what, key, ways, **_: [*ways()][-1])
        yield


def randomize(network: nn.Module) -> None:
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "running_var" in name:
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point():
                value.normal_()


def accelerated_copy(network: nn.Module, **settings: bool) -> nn.Module:
    return accelerate(copy.deepcopy(network), **settings)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def pair(request) -> tuple[nn.Module, nn.Module]:
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
            activation=nn.ReLU(),
        ),
        nn.Conv2d(8, 4, 1),
        Conv2d(4, 4, 3, padding=1, norm=nn.GroupNorm(2, 4), activation=nn.ReLU()),
    )
    randomize(network)
    return network, accelerated_copy(network)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 20)


def gradients(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    network(x).square().mean().backward()
    return {name: p.grad for name, p in network.named_parameters()}


def test_outputs_gradients_and_state_are_equal(pair, device):
    x = images().to(device)
    for network in pair:
        network.to(device)
    assert_close(pair[1](x), pair[0](x), **CLOSE)
    assert_close(gradients(pair[1], x), gradients(pair[0], x), **CLOSE)
    assert_close(pair[1].state_dict(), pair[0].state_dict())


# What a cache of folded weights gets wrong.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_between_two_steps_changes_nothing(pair, mode):
    x = images()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.01) for network in pair]
    for _ in range(3):
        for network, optimizer in zip(pair, optimizers, strict=True):
            assert all(g is not None and g.any() for g in gradients(network, x).values())
            optimizer.step()
        assert_close(pair[1].state_dict(), pair[0].state_dict(), **CLOSE)
        with mode():
            assert_close(pair[1](x), pair[0](x), **CLOSE)


def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.data = value.clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda parameter, value: parameter.data.copy_(value),
        lambda parameter, value: parameter.data.mul_(0.5),  # a moving average of weights
        lambda parameter, value: parameter.detach().numpy().__imul__(0.5),
        lambda parameter, value: parameter.copy_(value),
        assign,
    ],
)
@torch.no_grad()
def test_changed_weights_are_used(pair, change):
    x = images()
    pair[1](x)
    for (name, ours), theirs in zip(
        pair[1].state_dict(keep_vars=True).items(),
        pair[0].state_dict(keep_vars=True).values(),
        strict=True,
    ):
        value = torch.rand_like(theirs)
        for parameter in (ours, theirs):
            change(parameter, value)
        assert_close(pair[1](x), pair[0](x), **CLOSE, msg=name)


@torch.no_grad()
def test_parameters_given_from_outside_are_used(pair):
    x = images()
    pair[1](x)
    for _ in range(3):  # where a freed address would come again
        given_parameters = {k: torch.randn_like(v) for k, v in pair[0].named_parameters()}
        found, expected = (
            torch.func.functional_call(network, given_parameters, (x,))
            for network in reversed(pair)
        )
        assert_close(found, expected, **CLOSE)


def test_transforms_of_torch_func_go_through(pair):
    x = images()

    def loss(parameters, network, x):
        return torch.func.functional_call(network, parameters, (x,)).square().mean()

    parameters = dict(pair[0].named_parameters())
    found, expected = (torch.func.grad(loss)(parameters, network, x) for network in reversed(pair))
    assert_close(found, expected, **CLOSE)
    wide = Conv2d(64, 64, 3, padding=1, bias=False)
    ensemble = torch.randn(2, *wide.weight.shape)
    features = torch.randn(1, 64, 64, 64)

    def apply(weight, network):
        return torch.func.functional_call(network, {"weight": weight}, (features,))

    with torch.no_grad():
        found, expected = (
            torch.func.vmap(apply, in_dims=(0, None))(ensemble, network)
            for network in (accelerate(copy.deepcopy(wide)), wide)
        )
    assert_close(found, expected, **CLOSE)


def test_a_replaced_or_watched_norm_is_used(pair):
    x = images()
    for norm in (nn.GroupNorm(2, 8), nn.BatchNorm2d(8).eval(), nn.Identity(), None):
        for network in pair:
            network[0].norm = norm
        assert_close(pair[1](x), pair[0](x), **CLOSE)
    seen = []
    pair[1][1].norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(pair[1](x), pair[0](x), **CLOSE)
    assert len(seen) == 1


def test_copies_are_apart_and_carry_nothing_but_parameters(pair):
    x = images()
    with torch.no_grad():
        pair[1](x)
    sizes = []
    for network in pair:
        file = io.BytesIO()
        torch.save(network, file)
        sizes.append(file.tell())
    assert sizes[1] < sizes[0] + 2000  # names of classes and settings
    file.seek(0)
    expected = pair[0](x)
    for twin in (copy.deepcopy(pair[1]), torch.load(file, weights_only=False)):
        assert_close(twin(x), expected, **CLOSE)
        randomize(twin)
        assert not torch.allclose(twin(x), expected)
        assert_close(pair[1](x), expected, **CLOSE)


# Which normalizations are folded, and when.


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm])
def test_batch_norm_is_folded_out_of_training_only(norm):
    network = nn.Sequential(Conv2d(3, 8, 3, bias=False, norm=norm(8), activation=nn.ReLU()))
    randomize(network)
    accelerated = accelerated_copy(network)
    for _ in range(2):  # the second time after it has learned more
        if norm is not nn.SyncBatchNorm:  # trains on GPUs only
            x = images()
            assert_close(accelerated.train()(x), network.train()(x))
            assert_close(accelerated.state_dict(), network.state_dict())
        network.eval()
        accelerated.eval()
        with torch.no_grad(), mock.patch.object(accelerated[0].norm, "forward") as norm_forward:
            assert_close(accelerated(x := images()), network(x), **CLOSE)
        norm_forward.assert_not_called()


@pytest.mark.parametrize("norm_trains", [True, False])
def test_the_mode_of_the_norm_counts_not_the_convolutions(norm_trains):
    network = nn.Sequential(Conv2d(3, 8, 3, bias=False, norm=nn.BatchNorm2d(8)))
    randomize(network)
    network.train(not norm_trains)
    network[0].norm.train(norm_trains)
    accelerated = accelerated_copy(network)
    assert_close(accelerated(x := images()), network(x), **CLOSE)
    assert_close(accelerated.state_dict(), network.state_dict())


@pytest.mark.parametrize("kind", [{"affine": False}, {"track_running_stats": False}])
def test_other_batch_norm_stays(kind):
    network = nn.Sequential(Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8, **kind))).eval()
    randomize(network)
    assert_close(accelerated_copy(network)(x := images()), network(x), **CLOSE)


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2d])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@torch.no_grad()
def test_other_padding_is_what_it_was(kind, mode):
    network = nn.Sequential(kind(64, 64, 3, padding=1, padding_mode=mode))
    x = torch.randn(1, 64, 48, 48)
    assert torch.equal(accelerated_copy(network)(x), network(x))


# Ways of convolving.

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
    geometry = (stride, stride), (padding, padding), (1, 1), 1
    results = []
    for run, arguments in ((convolve, {"winograd": True}), (F.conv2d, {})):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        inputs_and_bias = [*inputs, *([] if has_bias else [None])]
        output = run(*inputs_and_bias, *geometry, **arguments)
        with torch.no_grad():
            inferred = run(*inputs_and_bias, *geometry, **arguments)
        results.append([output, inferred, *torch.autograd.grad(output.square().mean(), inputs)])
    for ours, expected in zip(*results, strict=True):
        limit = 1e-4 * max(1e-6, float(expected.detach().abs().max()))
        assert_close(ours, expected, atol=limit, rtol=0)


def took_winograd(network: nn.Module, x: torch.Tensor) -> bool:
    with torch.profiler.profile() as profiler:
        network(x)
    return any("_nnpack_spatial" in event.key for event in profiler.key_averages())


@needs_nnpack
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2d])
def test_large_convolutions_take_winograds_algorithm_in_inference(kind):
    network = nn.Sequential(kind(64, 64, 3, padding=1))
    x = torch.randn(1, 64, 64, 64)
    accelerated = accelerated_copy(network)
    assert not took_winograd(accelerated, x)  # there are gradients
    with torch.no_grad():
        assert took_winograd(accelerated, x)
        assert not took_winograd(accelerated_copy(network, winograd=False), x)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "batch"), [(1, 1, 1), (1, 2, 3), (3, 1, 2), (3, 1, 40)]
)
def test_the_way_that_was_measured_faster_is_taken(
    kernel, stride, batch, channels_last, grad, monkeypatch
):
    """Each way is measured on what it will get, and gives the same."""
    x = torch.randn(batch, 16, 17, 23)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, kernel, kernel)
    geometry = (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1
    expected = F.conv2d(x, weight, None, *geometry)
    measured = []

    def choose(what, key, ways, chosen, **_):
        for way in (by_name := ways()).values():
            way()
        measured.append([*by_name])
        return [*by_name][chosen]

    with torch.set_grad_enabled(grad):
        for chosen in (0, -1):
            choose_this = functools.partial(choose, chosen=chosen)
            monkeypatch.setattr(convolution, "fastest", choose_this)
            found = convolve(x, weight, None, *geometry, winograd=True)
            assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert all(names[0] == "direct" and len(names) == 2 for names in measured)
    with torch.set_grad_enabled(grad):
        assert bool(measured) == (not channels_last if kernel == 1 else has_winograd(x))


@contextlib.contextmanager
def machine(name: str):
    with mock.patch.object(platform, "machine", lambda: name):
        yield


@contextlib.contextmanager
def without_nnpack():
    with mock.patch.object(torch.backends.nnpack, "is_available", lambda: False):
        yield


@contextlib.contextmanager
def without_its_operator():
    operator = torch._nnpack_spatial_convolution
    del torch._nnpack_spatial_convolution
    try:
        yield
    finally:
        torch._nnpack_spatial_convolution = operator


@pytest.mark.parametrize(
    "situation", [lambda: machine("aarch64"), without_nnpack, without_its_operator]
)
@torch.no_grad()
def test_machines_without_it_take_the_ordinary_way(situation):
    network = nn.Sequential(Conv2d(64, 64, 3, padding=1))
    x = torch.randn(1, 64, 64, 64)
    with situation():
        assert torch.equal(accelerated_copy(network)(x), network(x))


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2d])
@pytest.mark.parametrize("shape", [(0, 64, 64, 64), (64, 64, 64)], ids=["empty", "3-D"])
@torch.no_grad()
def test_unusual_shapes_take_the_ordinary_way(kind, shape):
    for size, padding in ((3, 1), (1, 0)):
        network = nn.Sequential(kind(64, 64, size, padding=padding))
        x = torch.randn(shape)
        assert torch.equal(accelerated_copy(network)(x), network(x))


def heavy_tailed(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape)
    if kind == "lognormal":
        return (2 * x).exp()
    if kind == "student":
        return torch.distributions.StudentT(2.0).sample(shape)
    if kind == "outlier":
        x[0, 3, 20, 20] = 1e4
    elif kind == "pixel":
        x[0, :, 20, 20] = 100
    elif kind == "sparse":
        return x * (torch.rand(shape) < 0.02)
    elif kind == "rectified":
        return x.relu() ** 3
    return x


@needs_nnpack
@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize(
    "kind", ["normal", "rectified", "lognormal", "student", "outlier", "pixel", "sparse"]
)
@torch.no_grad()
def test_the_error_is_bounded_against_float64(kind, channels):
    """2e-3 of the mean magnitude, also beside outliers; about TF32's."""
    x = heavy_tailed(kind, (1, channels, 48, 48))
    network = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    found = accelerated_copy(network)(x)
    exact = F.conv2d(x.double(), network.weight.double(), padding=1)
    assert (found - exact).abs().max() <= 2e-3 * exact.abs().mean()
    if kind == "normal":
        assert took_winograd(accelerated_copy(network), x)
    if kind == "outlier":  # where Winograd's algorithm itself is far off
        winograd = torch._nnpack_spatial_convolution(x, network.weight, None, 1, 1)
        assert (winograd - exact).abs().max() > 2e-3 * exact.abs().mean()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((place, v) for place in ("features", "weights") for v in (math.inf, -math.inf, math.nan)),
        ("features", 1e36),
    ],
)
@torch.no_grad()
def test_values_that_are_not_finite_stay_where_they_are(place, value):
    x, network = torch.randn(1, 64, 48, 48), nn.Conv2d(64, 64, 3, padding=1)
    if place == "features":
        x[0, 3, 20, 20] = value
    else:
        network.weight[5, 3, 1, 1] = value
    assert_close(accelerated_copy(network)(x), network(x), equal_nan=True, **CLOSE)


def test_training_gradients_are_those_of_float64_as_far_as_without():
    network = nn.Sequential(Conv2d(64, 64, 3, padding=1, bias=False))
    x = heavy_tailed("student", (1, 64, 48, 48))
    exact = gradients(copy.deepcopy(network).double(), x.double())["0.weight"]
    errors = [
        (gradients(trained, x)["0.weight"] - exact).abs().max()
        for trained in (accelerated_copy(network), network)
    ]
    assert errors[0] <= 1.01 * errors[1]


def test_other_precisions_take_the_plain_convolution():
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    geometry = (1, 1), (1, 1), (1, 1), 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert convolve(x, weight, None, *geometry, winograd=True).dtype == torch.bfloat16
    with torch.no_grad():
        double = convolve(x.double(), weight.double(), None, *geometry, winograd=True)
    assert_close(double, F.conv2d(x.double(), weight.double(), padding=1))


# Tools that look at a network rather than run it.


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_compilers_see_one_graph_of_plain_convolutions(norm):
    network = nn.Sequential(Conv2d(64, 64, 3, padding=1, norm=norm(64))).eval()
    randomize(network)
    accelerated = accelerated_copy(network)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(accelerated, fullgraph=True, backend=backend)
    x = torch.randn(1, 64, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            assert_close(compiled(x), network(x), **CLOSE)
            randomize(network)
            accelerated.load_state_dict(network.state_dict())
    assert len(graphs) == 1
    assert "nnpack" not in graphs[0]


@torch.no_grad()
def test_traces_and_scripts_have_the_plain_convolution(pair):
    x = images()
    traced = torch.jit.trace(pair[1], x)
    scripted = torch.jit.script(pair[1])
    for module in (traced, scripted):
        assert "nnpack" not in str(module.inlined_graph)
        for size in ((16, 20), (33, 17)):
            x = torch.randn(1, 3, *size)
            assert_close(module(x), pair[0](x), **CLOSE)
    assert type(pair[1][0]) is not Conv2d  # scripting left it as it was


def test_exported_programs_have_the_plain_convolution(pair):
    x = images()
    exported = torch.export.export(pair[1], (x,))
    assert "nnpack" not in str(exported.graph)
    assert_close(exported.module()(x), pair[0](x), **CLOSE)
