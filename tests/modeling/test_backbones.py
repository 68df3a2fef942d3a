"""Backbones against Detectron2's own, with the same weights."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.projects.deeplab import add_deeplab_config
from torch.testing import assert_close

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config

STAGES = ["res2", "res3", "res4", "res5"]
CONFIGS = Path(__file__).parents[2] / "configs" / "backbones"


def config(name, depth=50, **keys):
    """A config of a backbone; ``keys`` like RESNETS__OUTPUT_STRIDE=8."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.STEM_TYPE = "basic"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = STAGES
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


def build(name, depth=50, **keys):
    return build_backbone(config(name, depth, **keys)).eval()


def image(height=64, width=96):
    return torch.randn(1, 3, height, width)


class TestDilated:
    NAME = "build_resnet_dilated_backbone"

    @pytest.mark.parametrize(
        ("stride", "name", "keys"),
        [
            (32, "build_resnet_backbone", {}),
            (16, "build_resnet_backbone", {"RESNETS__RES5_DILATION": 2}),
            (
                8,
                "build_resnet_deeplab_backbone",
                {
                    "RESNETS__RES4_DILATION": 2,
                    "RESNETS__RES5_DILATION": 4,
                    "RESNETS__RES5_MULTI_GRID": [1, 1, 1],
                },
            ),
        ],
    )
    def test_equals_detectron2s(self, stride, name, keys):
        ours, theirs = build(self.NAME, RESNETS__OUTPUT_STRIDE=stride), build(name, **keys)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert ours.output_shape() == theirs.output_shape()
        assert ours.output_shape()["res5"].stride == stride
        x = image()
        assert_close(ours(x), theirs(x))

    @pytest.mark.parametrize("stride", [8, 16, 32])
    @pytest.mark.parametrize("depth", [18, 50])
    def test_shapes(self, depth, stride):
        backbone = build(self.NAME, depth, RESNETS__OUTPUT_STRIDE=stride)
        check_shapes(backbone)
        assert backbone.size_divisibility == stride

    def test_dilation_samples_what_the_stride_would(self):
        """Where their samples coincide, both networks compute the same."""
        strided = build(self.NAME, 18)
        dilated = build(self.NAME, 18, RESNETS__OUTPUT_STRIDE=16)
        dilated.load_state_dict(strided.state_dict())
        # Detectron2 dilates the first 3x3 of the stage too, which the strided one does not: only
        # its central weight is left.
        around = [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]
        for model in (strided, dilated):
            model.res5[0].conv1.weight.data[:, :, around[0], around[1]] = 0
        x = image(128, 128)
        assert_close(dilated(x)["res5"][:, :, ::2, ::2], strided(x)["res5"])

    def test_freezing_is_kept(self):
        backbone = build(self.NAME, BACKBONE__FREEZE_AT=2, RESNETS__OUTPUT_STRIDE=8)
        frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
        assert frozen == {"stem", "res2"}

    @pytest.mark.parametrize("stride", [0, 4, 12, 64])
    def test_other_strides_are_errors(self, stride):
        with pytest.raises(UserError, match=rf"RESNETS.OUTPUT_STRIDE {stride}: .* 8, 16 and 32"):
            build(self.NAME, RESNETS__OUTPUT_STRIDE=stride)

    def test_two_ways_to_dilate_are_an_error(self):
        with pytest.raises(UserError, match="RES5_DILATION 2"):
            build(self.NAME, RESNETS__OUTPUT_STRIDE=16, RESNETS__RES5_DILATION=2)

    def test_deformable_stages_are_an_error(self):
        stages = [False, True, True, True]
        with pytest.raises(UserError, match="DEFORM_ON_PER_STAGE"):
            build(self.NAME, RESNETS__OUTPUT_STRIDE=16, RESNETS__DEFORM_ON_PER_STAGE=stages)


class TestSymmetric:
    NAME = "build_resnet_symmetric_backbone"

    @pytest.mark.parametrize(("depth", "channels"), [(18, 64), (50, 256)])
    def test_shapes(self, depth, channels):
        backbone = build(self.NAME, depth)
        assert backbone.output_shape() == {"p2": ShapeSpec(channels=channels, stride=4)}
        assert backbone.size_divisibility == 32
        check_shapes(backbone)

    def test_the_decoder_mirrors_the_encoder(self):
        backbone = build(self.NAME, RESNETS__NUM_GROUPS=32, RESNETS__WIDTH_PER_GROUP=4)
        for name in STAGES:
            encoder = getattr(backbone.bottom_up, name)
            decoder = getattr(backbone, f"decoder_{name}")
            assert len(encoder) == len(decoder)
            for theirs, ours in zip(encoder, decoder, strict=True):
                assert type(ours) is type(theirs)
                assert ours.conv2.weight.shape == theirs.conv2.weight.shape
                assert ours.conv3.weight.shape == theirs.conv3.weight.shape

    def test_every_parameter_learns(self):
        backbone = build(self.NAME, 18, RESNETS__NORM="BN").train()
        backbone(image())["p2"].square().sum().backward()
        assert all(p.grad is not None for p in backbone.parameters())

    def test_needs_all_stages(self):
        with pytest.raises(UserError, match="OUT_FEATURES .*'res2', 'res3', 'res4', 'res5'"):
            build(self.NAME, RESNETS__OUT_FEATURES=["res4", "res5"])

    def test_a_dilated_encoder_is_an_error(self):
        with pytest.raises(UserError, match="RES5_DILATION 2"):
            build(self.NAME, RESNETS__RES5_DILATION=2)


class TestGroupedFPN:
    NAME = "build_resnet_grouped_fpn_backbone"

    def test_one_group_equals_detectron2s(self):
        ours, theirs = build(self.NAME), build("build_resnet_fpn_backbone")
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert ours.output_shape() == theirs.output_shape()
        assert ours.size_divisibility == theirs.size_divisibility
        x = image()
        assert_close(ours(x), theirs(x))

    @pytest.mark.parametrize("norm", ["", "BN", "GN"])
    @pytest.mark.parametrize("groups", [2, 4])
    def test_groups_are_independent(self, groups, norm):
        backbone = build(self.NAME, 18, FPN__GROUPS=groups, FPN__NORM=norm)
        theirs = build("build_resnet_fpn_backbone", 18, FPN__NORM=norm)
        assert backbone.state_dict().keys() == theirs.state_dict().keys()
        check_shapes(backbone)

        laterals = []
        for conv in backbone.lateral_convs:
            conv.register_forward_hook(lambda *args: laterals.append(args[-1]))
        outputs = backbone(image())
        size = 64 // groups
        for output in outputs.values():
            for group in range(groups):
                own = slice(group * size, (group + 1) * size)
                gradients = torch.autograd.grad(
                    output[:, own].square().sum(), laterals, retain_graph=True, allow_unused=True
                )
                for gradient in gradients:
                    if gradient is None:  # of a finer level
                        continue
                    assert gradient[:, own].abs().sum() > 0
                    assert (
                        torch.cat([gradient[:, : own.start], gradient[:, own.stop :]], dim=1)
                        .eq(0)
                        .all()
                    )

    @pytest.mark.parametrize("groups", [-1, 0, 3, 128])
    def test_groups_that_do_not_divide_are_an_error(self, groups):
        with pytest.raises(UserError, match=rf"FPN.OUT_CHANNELS 64 .* MODEL.FPN.GROUPS {groups}"):
            build(self.NAME, 18, FPN__GROUPS=groups)

    def test_a_norm_that_mixes_groups_is_an_error(self):
        with pytest.raises(
            UserError, match=r"FPN.NORM GN mixes the channels of MODEL.FPN.GROUPS 3"
        ):
            build(self.NAME, 18, FPN__OUT_CHANNELS=96, FPN__GROUPS=3, FPN__NORM="GN")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!B]*.yaml")), ids=lambda path: path.stem)
def test_configs_train_and_predict_at_any_size(path, device):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.RESNETS.DEPTH == 101
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.DEVICE = 50, device.type
    model = build_model(cfg)
    height, width = 50, 75  # multiples of nothing
    inputs = [{"image": torch.rand(3, height, width) * 255, "height": 40, "width": 60}]
    targets = [{**inputs[0], "sem_seg": torch.randint(54, (height, width))}]
    assert model.train()(targets)["loss_sem_seg"].isfinite()
    assert model.eval()(inputs)[0]["sem_seg"].shape == (54, 40, 60)


def check_shapes(backbone):
    """Outputs are as ``output_shape`` says, at the smallest multiple of the divisibility too."""
    unit = backbone.size_divisibility
    for height, width in ((unit, unit), (3 * unit, 2 * unit)):
        outputs = backbone(image(height, width))
        assert outputs.keys() == backbone.output_shape().keys()
        for name, shape in backbone.output_shape().items():
            cells = tuple(-(-side // shape.stride) for side in (height, width))
            assert outputs[name].shape == (1, shape.channels, *cells)
