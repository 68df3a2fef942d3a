"""Modules with fewer operators and waits, against Detectron2's own."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from panoptic_fpn_ext import accelerate
from panoptic_fpn_ext.layers import convolution
from panoptic_fpn_ext.modeling import lean, lean_backbone

pytestmark = pytest.mark.usefixtures("on_device")

SIZES = [(60, 96), (64, 70)]


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(lean, "is_eager_on_gpu", lambda *x: True)


def make_boxes(number: int, size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    height, width = size
    corners = torch.rand(number, 2, 2) * torch.tensor([width, height])
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)


def make_rpn(**options):
    cfg = get_cfg()
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 150
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 40
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    shapes = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}
    plain = build_proposal_generator(cfg, shapes)
    for parameter in plain.rpn_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return plain, accelerate(copy.deepcopy(plain))


def rpn_inputs():
    images = ImageList(torch.zeros(2, 3, 64, 96), SIZES)
    features = {"p2": torch.randn(2, 8, 16, 24), "p3": torch.randn(2, 8, 8, 12)}
    gt = [
        Instances(size, gt_boxes=Boxes(make_boxes(number, size)))
        for size, number in zip(SIZES, (5, 0), strict=True)
    ]
    return images, features, gt


def assert_same_proposals(ours: list[Instances], theirs: list[Instances]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.image_size == other.image_size
        assert_close(mine.proposal_boxes.tensor, other.proposal_boxes.tensor, rtol=0, atol=0)
        assert_close(mine.objectness_logits, other.objectness_logits, rtol=0, atol=0)


@pytest.mark.parametrize("min_size", [0, 12])
def test_proposals_are_equal(min_size):
    models = make_rpn(**{"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": min_size})
    images, features, _ = rpn_inputs()
    for model in models:
        model.eval()
    with torch.no_grad():
        theirs, ours = (model(images, features)[0] for model in models)
    assert all(len(x) for x in ours)
    assert_same_proposals(ours, theirs)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rpn_losses_and_gradients_are_equal(kind, beta, rounding):
    options = {"MODEL.RPN.BBOX_REG_LOSS_TYPE": kind, "MODEL.RPN.SMOOTH_L1_BETA": beta}
    models = make_rpn(**options, **{"MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 2.0})
    images, features, gt = rpn_inputs()
    found = []
    for model in models:
        torch.manual_seed(3)
        with EventStorage() as storage:
            proposals, losses = model(images, features, gt)
            scalars = {k: v for k, (v, _) in storage.latest().items()}
        sum(losses.values()).backward()
        found.append((proposals, losses, [p.grad for p in model.parameters()], scalars))
    (theirs, *expected), (ours, *rest) = found
    assert expected[0]["loss_rpn_loc"] > 0
    assert_same_proposals(ours, theirs)
    assert_close(rest, expected, **rounding)


@pytest.mark.parametrize("where", ["boxes", "scores", "both"])
def test_what_is_not_finite_is_no_proposal_and_stops_training(where):
    models = make_rpn()
    outputs = []
    for model in models:
        torch.manual_seed(5)
        levels = [(torch.randn(2, number), torch.randn(2, number, 4)) for number in (200, 60)]
        anchors = [Boxes(make_boxes(number)) for number in (200, 60)]
        if where != "scores":
            levels[0][1][0, 7] = torch.nan
            levels[0][0][0, 7] = 9.0
        if where != "boxes":
            levels[1][0][1, 3] = torch.inf
        args = anchors, [x for x, _ in levels], [x for _, x in levels], SIZES
        model.eval()
        outputs.append(model.predict_proposals(*args))
        model.train()
        with pytest.raises(FloatingPointError, match="diverged"):
            model.predict_proposals(*args)
    assert_same_proposals(outputs[1], outputs[0])


@pytest.mark.parametrize("aligned", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooled_features_and_gradients_are_equal(as_on_a_gpu, aligned, sampling_ratio, rounding):
    plain = ROIPooler(5, [1 / 4, 1 / 8, 1 / 16], sampling_ratio, aligned, canonical_box_size=32)
    pooler = accelerate(copy.deepcopy(plain))
    maps = [torch.randn(3, 2, 64 // s, 96 // s, requires_grad=True) for s in (4, 8, 16)]
    boxes = [Boxes(make_boxes(20)), Boxes(torch.zeros(0, 4)), Boxes(make_boxes(7))]
    boxes[0].tensor[0] = torch.tensor([-30, -20, 300, 200])
    boxes[0].tensor[1, 2:] = boxes[0].tensor[1, :2]
    found = []
    for each in (pooler, plain):
        pooled = each(maps, boxes)
        weights = torch.linspace(-1, 1, pooled.numel()).view_as(pooled)
        found.append((pooled, torch.autograd.grad((pooled * weights).sum(), maps)))
    assert_close(*found, **rounding)
    none = [Boxes(torch.zeros(0, 4))] * 3
    assert pooler(maps, none).shape == (0, 2, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_in_half_precision(as_on_a_gpu, dtype, sampling_ratio):
    plain = ROIPooler(5, [1 / 4, 1 / 8], sampling_ratio, "ROIAlignV2", canonical_box_size=32)
    maps = [torch.randn(1, 2, 64 // s, 96 // s, dtype=dtype) for s in (4, 8)]
    boxes = [Boxes(make_boxes(20))]
    with torch.autocast(maps[0].device.type, dtype):
        found, expected = (
            pooler(maps, boxes) for pooler in (accelerate(copy.deepcopy(plain)), plain)
        )
    assert found.dtype == expected.dtype == dtype
    assert_close(found, expected)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("number", [0, 1, 300])
def test_detections_are_equal(agnostic, number):
    plain = FastRCNNOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
        num_classes=4,
        cls_agnostic_bbox_reg=agnostic,
        test_score_thresh=0.1,
        test_nms_thresh=0.5,
        test_topk_per_image=30,
    )
    ours = accelerate(copy.deepcopy(plain))
    proposals = [
        Instances(size, proposal_boxes=Boxes(make_boxes(n)))
        for size, n in zip(SIZES, (number, 50), strict=True)
    ]
    logits = torch.randn(number + 50, 5)
    deltas = torch.randn(number + 50, 4 if agnostic else 16)
    found, _ = plain.inference((logits, deltas), proposals)
    kept, rows = ours.inference((logits, deltas), proposals)
    for mine, other in zip(kept, found, strict=True):
        assert_close(mine.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=0)
        assert_close(mine.scores, other.scores, rtol=0, atol=0)
        assert torch.equal(mine.pred_classes, other.pred_classes)
    scores = logits.softmax(dim=1)[-50:]
    assert torch.equal(scores[rows[1], kept[1].pred_classes], kept[1].scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_and_boxes_are_not_rounded_to_half_precision(dtype):
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=8), box2box_transform=Box2BoxTransform((1, 1, 1, 1)), num_classes=4
    )
    logits, deltas = torch.randn(40, 5).to(dtype), torch.randn(40, 16).to(dtype)
    proposals = [Instances((64, 96), proposal_boxes=Boxes(make_boxes(40)))]
    (expected,), _ = predictor.inference((logits.float(), deltas.float()), proposals)
    (found,), _ = accelerate(copy.deepcopy(predictor)).inference((logits, deltas), proposals)
    assert_close(found.scores, expected.scores)
    assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_detections_of_what_is_not_finite():
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=8), box2box_transform=Box2BoxTransform((1, 1, 1, 1)), num_classes=4
    )
    logits, deltas = torch.randn(40, 5), torch.randn(40, 16)
    logits[3, 1] = torch.nan
    deltas[5, 2] = torch.inf
    deltas[6, 0] = torch.nan
    proposals = [Instances((64, 96), proposal_boxes=Boxes(make_boxes(40)))]
    (expected,), _ = predictor.inference((logits, deltas), proposals)
    (found,), rows = accelerate(copy.deepcopy(predictor)).inference((logits, deltas), proposals)
    assert not {3, 6} & {*rows[0].tolist()}
    assert_close(found.scores, expected.scores)
    assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_normalizations_found_at_once_are_those_of_each(monkeypatch, ext_cfg):
    """And nothing of them stays: new statistics count at once."""
    backbone = build_model(ext_cfg).backbone.bottom_up.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        each = backbone(image)
        monkeypatch.setattr(lean_backbone, "is_eager_on_gpu", lambda *x: True)
        calls = []
        affine = convolution._affine
        monkeypatch.setattr(convolution, "_affine", lambda n: calls.append(n) or affine(n))
        assert_close(backbone(image), each)
        assert len(calls) == 1
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.data.mul_(3)
        other = backbone(image)
        monkeypatch.undo()
        assert_close(other, backbone(image))
    assert not any("_affine" in vars(module) for module in backbone.modules())
