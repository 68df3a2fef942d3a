"""The semantic head against Detectron2's, with the same weights."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch.testing import assert_close

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.modeling import SemanticFPNHead

from ..conftest import on_cpu

pytestmark = pytest.mark.usefixtures("on_device")

SHAPES = {f"p{k}": ShapeSpec(channels=16, stride=2**k) for k in range(2, 6)}


def pair_of_heads(shapes=SHAPES, **changes):
    args = {
        "num_classes": 5,
        "conv_dims": 32,
        "common_stride": 4,
        "norm": "GN",
        "loss_weight": 0.5,
        "ignore_value": 255,
        **changes,
    }
    ours, theirs = SemanticFPNHead(shapes, **args), SemSegFPNHead(shapes, **args)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def features(height=64, width=96):
    return {
        name: torch.randn(2, s.channels, height // s.stride, width // s.stride)
        for name, s in SHAPES.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": ""},
        {"norm": "BN"},
        {"common_stride": 8, "shapes": {k: v for k, v in SHAPES.items() if k != "p2"}},
    ],
)
def test_logits_equal_detectron2s(changes, rounding):
    ours, theirs = pair_of_heads(**changes)
    inputs = features()
    assert_close(ours.eval()(inputs)[0], theirs.eval()(inputs)[0], **rounding)


def test_loss_and_gradients_equal_detectron2s(rounding):
    ours, theirs = pair_of_heads()
    inputs = features()
    targets = torch.randint(0, 5, (2, 64, 96))
    targets[:, :10] = 255
    for head in (ours, theirs):
        head.train()
        result, losses = head(inputs, targets)
        assert result is None
        losses["loss_sem_seg"].backward()
    assert_close(ours(inputs, targets)[1], theirs(inputs, targets)[1], **rounding)
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    assert_close({k: p.grad for k, p in ours.named_parameters()}, gradients, **rounding)


def test_concat_predicts_from_all_levels_side_by_side(rounding):
    """A 1x1 convolution of a concatenation is the sum of those of its parts."""
    arguments = {"num_classes": 5, "conv_dims": 32, "common_stride": 4, "norm": "GN"}
    concat = SemanticFPNHead(SHAPES, aggregation="concat", **arguments)
    inputs = features()
    weights = concat.predictor.weight.split(32, dim=1)
    expected = concat.predictor.bias[:, None, None]
    for name, weight in zip(SHAPES, weights, strict=True):
        expected = expected + torch.nn.functional.conv2d(
            getattr(concat, name)(inputs[name]), weight
        )
    assert_close(concat.layers(inputs), expected, **({"atol": 1e-5, "rtol": 1e-4} | rounding))


@on_cpu
def test_no_features_is_an_error_that_names_the_key():
    with pytest.raises(UserError, match="IN_FEATURES"):
        SemanticFPNHead({}, num_classes=5, conv_dims=32, common_stride=4)


@on_cpu
def test_a_level_finer_than_the_common_stride_is_an_error_that_names_the_key():
    with pytest.raises(UserError, match="COMMON_STRIDE 8 .* p2"):
        SemanticFPNHead(SHAPES, num_classes=5, conv_dims=32, common_stride=8)
