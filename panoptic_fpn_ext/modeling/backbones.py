"""Backbones for features of higher resolution (paper, section 3 and figure 5), and grouped FPN.

All are built of Detectron2's ResNet, whose parameter names and pretrained weights they keep.
"""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from ..errors import UserError

STAGES = ("res2", "res3", "res4", "res5")
OUTPUT_STRIDES = (8, 16, 32)


class DilatedResNet(ResNet):
    """ResNet whose last stages are dilated instead of strided (paper, figure 5).

    Dilations are Detectron2's: every 3x3 convolution of a stage whose stride was removed is
    dilated by as much as the resolution of the stage has grown.
    """

    def __init__(self, resnet: ResNet, *, output_stride: int, out_features: list[str]) -> None:
        """
        Args:
            resnet: an ordinary ResNet; its blocks are taken over and changed in place.
            output_stride: the stride no stage goes beyond: 8, 16 or 32 (none is changed).
            out_features: stages whose outputs are returned.

        Raises:
            UserError: another output stride.
        """
        if output_stride not in OUTPUT_STRIDES:
            raise UserError(
                f"MODEL.RESNETS.OUTPUT_STRIDE {output_stride}: allowed are 8, 16 and 32"
            )
        stride = resnet.stem.stride
        for stage in resnet.stages:
            stride *= stage[0].stride
            if stride > output_stride:
                _dilate(stage, stride // output_stride)
        super().__init__(
            resnet.stem, [list(stage) for stage in resnet.stages], out_features=out_features
        )

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride: the semantic head brings its logits to the size of the image."""
        return max(shape.stride for shape in self.output_shape().values())


class SymmetricDecoder(Backbone):
    """ResNet followed by its mirror image, a U-Net of residual blocks (paper, figure 5).

    For each stage of the encoder, from the coarsest, the decoder has one of as many blocks, as
    wide. Between them, as in U-Net (arXiv:1505.04597), a 2x2 transposed convolution doubles the
    resolution and halves the channels, and the output of the encoder's stage is concatenated.

    Returns one map, ``p2``: the channels and the stride of ``res2``.
    """

    def __init__(self, bottom_up: ResNet, *, norm: str = "GN") -> None:
        """
        Args:
            bottom_up: the encoder, which returns all its stages, each half the size of the last.
            norm: normalization in the decoder, as for :func:`get_norm`.
        """
        super().__init__()
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        self._size_divisibility = shapes[STAGES[-1]].stride
        channels = None
        for name, stage in zip(reversed(STAGES), reversed(bottom_up.stages), strict=True):
            skip = shapes[name].channels
            if channels is not None:
                self.add_module(f"up_{name}", nn.ConvTranspose2d(channels, skip, 2, stride=2))
            in_channels = skip if channels is None else 2 * skip
            self.add_module(f"decoder_{name}", _mirror(stage, in_channels, norm))
            channels = skip
        self._out_features = ["p2"]
        self._out_feature_channels = {"p2": channels}
        self._out_feature_strides = {"p2": shapes[STAGES[0]].stride}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            image: (N, C, H, W), H and W multiples of :attr:`size_divisibility`.

        Returns:
            ``{"p2": (N, channels of res2, H / 4, W / 4)}``.
        """
        encoded = self.bottom_up(image)
        x = None
        for name in reversed(STAGES):
            skip = encoded[name]
            x = skip if x is None else torch.cat([skip, getattr(self, f"up_{name}")(x)], dim=1)
            x = getattr(self, f"decoder_{name}")(x)
        return {"p2": x}


class GroupedFPN(FPN):
    """FPN whose 3x3 convolutions are grouped, the grouped FPN of the paper.

    Each group of an output's channels depends on the same group of the lateral channels alone, so
    that each branch can be given features of its own. With one group it is :class:`FPN`.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        *,
        groups: int = 1,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
    ) -> None:
        """
        Args:
            groups: of the output channels, which they must divide.
            bottom_up, in_features, out_channels, norm, top_block, fuse_type: those of
                :class:`FPN`.

        Raises:
            UserError: the groups do not divide the channels, or the normalization mixes them.
        """
        if groups < 1 or out_channels % groups:
            raise UserError(
                f"MODEL.FPN.OUT_CHANNELS {out_channels} cannot be divided into MODEL.FPN.GROUPS "
                f"{groups}: set GROUPS to a divisor of OUT_CHANNELS"
            )
        super().__init__(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
        for conv in self.output_convs if groups > 1 else ():
            grouped = isinstance(conv.norm, nn.GroupNorm)
            if norm == "LN" or (grouped and conv.norm.num_groups % groups):
                raise UserError(
                    f"MODEL.FPN.NORM {norm} mixes the channels of MODEL.FPN.GROUPS {groups}: set "
                    'NORM to "BN", or to "GN" where GROUPS divides 32'
                )
            conv.groups = groups
            conv.weight = nn.Parameter(conv.weight[:, : out_channels // groups].detach().clone())
            weight_init.c2_xavier_fill(conv)


@BACKBONE_REGISTRY.register()
def build_resnet_dilated_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedResNet:
    """ResNet of output stride ``MODEL.RESNETS.OUTPUT_STRIDE``."""
    keys = cfg.MODEL.RESNETS
    if any(keys.DEFORM_ON_PER_STAGE) and keys.OUTPUT_STRIDE != 32:
        raise UserError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE {keys.DEFORM_ON_PER_STAGE}: deformable stages "
            "cannot be dilated, set it to [False, False, False, False]"
        )
    return DilatedResNet(
        _build_resnet(cfg, input_shape),
        output_stride=keys.OUTPUT_STRIDE,
        out_features=keys.OUT_FEATURES,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_symmetric_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SymmetricDecoder:
    """ResNet with a decoder that mirrors it, normalized by ``MODEL.SYMMETRIC_DECODER.NORM``."""
    if set(cfg.MODEL.RESNETS.OUT_FEATURES) != set(STAGES):
        raise UserError(
            f"MODEL.RESNETS.OUT_FEATURES {cfg.MODEL.RESNETS.OUT_FEATURES}: the symmetric decoder "
            f"needs {list(STAGES)}"
        )
    return SymmetricDecoder(_build_resnet(cfg, input_shape), norm=cfg.MODEL.SYMMETRIC_DECODER.NORM)


@BACKBONE_REGISTRY.register()
def build_resnet_grouped_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> GroupedFPN:
    """Detectron2's ``build_resnet_fpn_backbone`` with ``MODEL.FPN.GROUPS`` groups of channels."""
    return GroupedFPN(
        _build_resnet(cfg, input_shape),
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        groups=cfg.MODEL.FPN.GROUPS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet, each stage after the first half the size of the one before."""
    if cfg.MODEL.RESNETS.RES5_DILATION != 1:
        raise UserError(
            f"MODEL.RESNETS.RES5_DILATION {cfg.MODEL.RESNETS.RES5_DILATION}: this backbone needs "
            "1; for a dilated ResNet use build_resnet_dilated_backbone and "
            "MODEL.RESNETS.OUTPUT_STRIDE"
        )
    return build_resnet_backbone(cfg, input_shape)


def _dilate(stage: nn.Sequential, dilation: int) -> None:
    """Take the stride from a stage, and dilate its convolutions instead."""
    stage[0].stride = 1
    for module in stage.modules():
        if isinstance(module, Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def _mirror(stage: nn.Sequential, in_channels: int, norm: str) -> nn.Sequential:
    """A stage of as many blocks, as wide, that keeps the resolution."""
    block = stage[0]
    if isinstance(block, BasicBlock):
        arguments = {"block_class": BasicBlock}
    else:
        arguments = {
            "block_class": BottleneckBlock,
            "bottleneck_channels": block.conv1.out_channels,
            "num_groups": block.conv2.groups,
        }
    return nn.Sequential(
        *ResNet.make_stage(
            num_blocks=len(stage),
            in_channels=in_channels,
            out_channels=block.out_channels,
            norm=norm,
            **arguments,
        )
    )
