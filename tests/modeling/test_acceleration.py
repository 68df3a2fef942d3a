"""Accelerated modules against the ones they stand in for."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.testing import assert_close

from panoptic_fpn_ext.modeling.acceleration import fold_frozen_batch_norm


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
        Conv2d(8, 4, 1),
    )
    randomize(network)
    accelerated = copy.deepcopy(network)
    fold_frozen_batch_norm(accelerated)
    return network, accelerated


def randomize(network):
    for name, value in network.state_dict().items():
        value.copy_(
            torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value)
        )


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
