"""Accelerated models against the ones they are made of."""

import copy
import io

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, ROIAlign, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from panoptic_fpn_ext import accelerate, add_panoptic_fpn_config, decelerate
from panoptic_fpn_ext.layers import convolution
from panoptic_fpn_ext.layers.stand_in import StandIn
from panoptic_fpn_ext.modeling import acceleration, lean_backbone
from panoptic_fpn_ext.modeling import lean as lean_modules
from panoptic_fpn_ext.modeling.acceleration import Acceleration

from ..conftest import assert_same_outputs, on_cpu


@pytest.fixture(params=["GeneralizedRCNN", "PanopticFPN", "PanopticFPNExt", "RetinaNet"])
def model(request, detectron2_cfg, ext_cfg):
    """Models of Detectron2 and ours, the latter without its acceleration."""
    cfg = ext_cfg if request.param == "PanopticFPNExt" else detectron2_cfg
    cfg.MODEL.META_ARCHITECTURE = request.param
    if request.param == "RetinaNet":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.NUM_CLASSES = 3
    return decelerate(build_model(cfg)).eval()


def stand_ins(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, StandIn)]


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Those in plain lists, too."""
    lists = [v for m in model.modules() for v in vars(m).values() if type(v) is list]
    return [*model.modules(), *(v for values in lists for v in values if isinstance(v, nn.Module))]


@torch.no_grad()
def test_any_model_of_detectron2_gives_the_same(model, training_batch):
    inputs = [{"image": x["image"], "height": 70, "width": 90} for x in training_batch]
    expected = model(inputs)
    accelerated = accelerate(copy.deepcopy(model))
    assert stand_ins(accelerated)
    assert not any(type(m) in (Conv2d, nn.Conv2d, ROIAlign) for m in all_modules(accelerated))
    for found, wanted in zip(accelerated(inputs), expected, strict=True):
        if "panoptic_seg" in wanted:
            assert_same_outputs(found, wanted)
        else:
            scores = found["instances"].scores, wanted["instances"].scores
            assert_close(*scores, atol=1e-4, rtol=0)


@on_cpu
def test_parameters_stay_and_all_is_undone_in_one_call(model):
    names = {name: type(module) for name, module in model.named_modules()}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    keys = list(model.state_dict())
    assert accelerate(model) is model
    assert decelerate(copy.deepcopy(model)) is not model
    assert stand_ins(model)
    assert list(model.state_dict()) == keys
    for was, now in (
        (parameters, dict(model.named_parameters())),
        (buffers, dict(model.named_buffers())),
    ):
        assert list(was) == list(now)
        assert all(now[name] is was[name] for name in was)
    assert decelerate(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert not any(isinstance(module, StandIn) for module in all_modules(model))
    for module in all_modules(model):
        assert not {"winograd", "fold_batch_norm", "channels_last"} & vars(module).keys()


def test_the_last_settings_count():
    conv = accelerate(accelerate(Conv2d(3, 4, 1), winograd=True), winograd=False)
    assert not conv.winograd
    assert type(decelerate(conv)) is Conv2d


def test_a_model_trains_on_after_an_evaluation_as_the_plain_one(ext_cfg, training_batch, rounding):
    ext_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    ours = build_model(ext_cfg)
    plain = decelerate(copy.deepcopy(ours))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (ours, plain)]
    for step in range(3):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            torch.manual_seed(step)
            with EventStorage(step):
                losses = model.train()(training_batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(training_batch)
        close = {"atol": 1e-5, "rtol": 1e-4} | rounding
        assert_close(ours.state_dict(), plain.state_dict(), **close)


def test_copies_and_files_hold_the_whole_model(model, training_batch, rounding):
    accelerate(model)
    with torch.no_grad():
        expected = model(training_batch)[0]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            found = twin(training_batch)[0]
            scores = found["instances"].scores, expected["instances"].scores
            assert_close(*scores, **rounding)
            assert stand_ins(twin)


@on_cpu
@pytest.mark.parametrize("name", ["PanopticFPN", "PanopticFPNExt"])
def test_flops_are_counted_as_in_the_plain_model(detectron2_cfg, ext_cfg, name):
    cfg = ext_cfg if name == "PanopticFPNExt" else detectron2_cfg
    cfg.TEST.DETECTIONS_PER_IMAGE = 2  # a trace unrolls what is done for each
    model = decelerate(build_model(cfg)).eval()
    inputs = [{"image": torch.randint(0, 256, (3, 64, 64))}]
    counts = []
    for counted in (model, accelerate(copy.deepcopy(model))):
        analysis = FlopCountAnalysis(counted, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts.append(analysis.by_operator())
    assert counts[0] == counts[1]
    assert counts[0]["conv"] > 0


@pytest.mark.parametrize("number", [0, 1, 70])
def test_mask_logits_are_equal(number):
    shape = ShapeSpec(channels=8, height=14, width=14)
    head = MaskRCNNConvUpsampleHead(shape, num_classes=3, conv_dims=[8, 8, 8]).eval()
    lean = accelerate(copy.deepcopy(head))
    x = torch.randn(number, 8, 14, 14)
    with torch.no_grad():
        assert_close(lean.layers(x), head.layers(x), atol=1e-5, rtol=1e-5)
    assert_close(lean.train().layers(x), head.train().layers(x), atol=1e-5, rtol=1e-5)


def test_mask_heads_hold_the_features_of_some_instances_at_once():
    shape = ShapeSpec(channels=8, height=14, width=14)
    lean = accelerate(MaskRCNNConvUpsampleHead(shape, num_classes=3, conv_dims=[8])).eval()
    batches = []
    lean.predictor.register_forward_hook(lambda *args: batches.append(len(args[2])))
    with torch.no_grad():
        lean.layers(torch.randn(70, 8, 14, 14))
    assert max(batches) <= lean_modules.MAX_MASKS


@torch.no_grad()
def test_a_trace_of_the_mask_head_takes_any_number_of_instances():
    shape = ShapeSpec(channels=8, height=14, width=14)
    head = MaskRCNNConvUpsampleHead(shape, num_classes=3, conv_dims=[8, 8]).eval()
    lean = accelerate(copy.deepcopy(head))

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = lean

        def forward(self, x):
            return self.head.layers(x)

    traced = torch.jit.trace(Layers(), torch.randn(40, 8, 14, 14))
    for number in (1, 10, 70):
        x = torch.randn(number, 8, 14, 14)
        assert_close(traced(x), head.layers(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conv_dims", [[-1], [-1, 12, 16]])
@pytest.mark.parametrize("height", [1, 8, 9, 41])
def test_proposals_of_strips_are_equal(monkeypatch, conv_dims, height):
    monkeypatch.setattr(lean_modules, "RPN_MAX_PIXELS", 60)
    monkeypatch.setattr(lean_modules, "RPN_STRIP_PIXELS", 32)
    head = StandardRPNHead(in_channels=16, num_anchors=3, conv_dims=conv_dims)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    lean = accelerate(copy.deepcopy(head))
    features = [torch.randn(2, 16, height, 8), torch.randn(2, 16, 3, 5)]
    strips = []
    lean.conv.register_forward_hook(lambda *args: strips.append(args[1][0]))
    for grad in (True, False):
        strips.clear()
        with torch.set_grad_enabled(grad):
            assert_close(lean(features), head(features), atol=1e-4, rtol=1e-4)
            in_strips = height > 7 and lean_modules.has_winograd(features[0])
        assert (len(strips) > 2) == in_strips
        if in_strips:  # each of 4 rows, and those beside it that the convolutions reach
            assert max(strip.shape[2] for strip in strips) <= 4 + 2 * len(conv_dims)


@torch.no_grad()
def test_heads_script():
    rpn = StandardRPNHead(in_channels=16, num_anchors=3)
    mask = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=8, height=14, width=14), num_classes=1, conv_dims=[8]
    ).eval()
    align = ROIAlign((7, 7), 0.25, 0, aligned=True)
    features = [torch.randn(1, 16, 9, 8), torch.randn(1, 16, 3, 5)]
    rois = torch.tensor([[0.0, 3, 4, 20, 25]])
    arguments = {rpn: (features,), align: (features[0], rois)}
    for module, args in arguments.items():
        scripted = torch.jit.script(accelerate(copy.deepcopy(module)))
        assert_close(scripted(*args), module(*args))
    instances = Instances(
        (20, 20), pred_classes=torch.zeros(2, dtype=torch.int64), pred_boxes=Boxes(torch.rand(2, 4))
    )
    expected = mask(torch.ones(2, 8, 14, 14), [instances])
    assert_close(
        accelerate(copy.deepcopy(mask))(torch.ones(2, 8, 14, 14), [instances])[0].pred_masks,
        expected[0].pred_masks,
    )


@pytest.mark.parametrize("layout", ["planar", "channels last"])
@pytest.mark.parametrize("backbone", ["resnet_fpn", "resnet_dilated"])
@torch.no_grad()
def test_a_backbone_gives_the_same_in_either_layout(layout, backbone, monkeypatch):
    """And it is asked for the layout once, with both of them as ways."""
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.BACKBONE.NAME = f"build_{backbone}_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    if backbone == "resnet_dilated":
        cfg.MODEL.RESNETS.OUTPUT_STRIDE = 16
    plain = build_backbone(cfg).eval()
    asked = []

    def choose(what, key, ways, **_):
        by_name = ways()
        outputs = [way() for way in by_name.values()]
        asked.append([*by_name])
        for name in outputs[0]:
            assert_close(outputs[1][name], outputs[0][name], atol=1e-3, rtol=1e-3)
        return layout

    monkeypatch.setattr(lean_backbone, "fastest", choose)
    monkeypatch.setattr(convolution, "fastest", lambda what, key, ways, **_: "direct")
    x = torch.randn(2, 3, 64, 96)
    found, expected = accelerate(copy.deepcopy(plain))(x), plain(x)
    for name in expected:
        assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)
    assert asked == [["planar", "channels last"]]
    if backbone == "resnet_dilated":
        is_planar = found["res5"].is_contiguous()
        assert is_planar == (layout == "planar")
    asked.clear()
    accelerate(copy.deepcopy(plain), channels_last=False)(x)
    with torch.enable_grad():
        accelerate(copy.deepcopy(plain))(x)
    assert not asked


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_the_precision_that_was_measured_faster_is_taken(chosen, monkeypatch):
    def choose(what, key, ways, **_):
        for way in (by_name := ways()).values():
            way()
        assert [*by_name] == ["float32", "bfloat16"]
        return chosen

    monkeypatch.setattr(acceleration, "fastest", choose)
    with Acceleration(precision="auto").autocast(torch.device("cpu")):
        found = torch.ones(2, 2) @ torch.ones(2, 2)
    assert found.dtype == getattr(torch, chosen)


def test_measuring_a_precision_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with Acceleration(precision="auto").autocast(torch.device("cpu")):
        pass
    assert torch.equal(torch.rand(3), expected)
