"""The semantic branch (paper, section 3.1 and figure 3)."""

import math
from collections.abc import Callable
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from ..layers.resizing import upsampled_cross_entropy

AGGREGATIONS = ("sum", "concat")


@SEM_SEG_HEADS_REGISTRY.register()
class SemanticFPNHead(nn.Module):
    """Semantic segmentation from the levels of a feature pyramid.

    Each level goes through stages of 3x3 convolution, normalization, ReLU and 2x bilinear
    upsampling until it has the common stride; the levels are summed or concatenated, a 1x1
    convolution predicts the classes, and bilinear upsampling brings them to the size of the image.

    Parameter names equal those of Detectron2's ``SemSegFPNHead``, which always sums.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        norm: str | Callable | None = None,
        aggregation: str = "sum",
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        """
        Args:
            input_shape: channels and stride of each feature map to use.
            num_classes: semantic classes, "things" included where it is one.
            conv_dims: channels of the branch.
            common_stride: the stride all levels are brought to.
            norm: normalization after each 3x3 convolution, as for :func:`get_norm`.
            aggregation: ``"sum"`` or ``"concat"`` of the levels (paper, table 1c).
            loss_weight: λs.
            ignore_value: pixels of this class have no loss.
        """
        super().__init__()
        levels = sorted(input_shape.items(), key=lambda level: level[1].stride)
        if not levels:
            raise UserError("MODEL.SEM_SEG_HEAD.IN_FEATURES names no output of the backbone")
        if levels[0][1].stride < common_stride:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE {common_stride} is more than the stride "
                f"{levels[0][1].stride} of {levels[0][0]}, one of MODEL.SEM_SEG_HEAD.IN_FEATURES"
            )
        if aggregation not in AGGREGATIONS:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.AGGREGATION {aggregation!r}: allowed are {list(AGGREGATIONS)}"
            )
        self.in_features = [name for name, _ in levels]
        self.aggregation = aggregation
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        for name, shape in levels:
            self.add_module(name, _level(shape, conv_dims, common_stride, norm))
        width = conv_dims if aggregation == "sum" else conv_dims * len(levels)
        self.predictor = Conv2d(width, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "conv_dims": head.CONVS_DIM,
            "common_stride": head.COMMON_STRIDE,
            "norm": head.NORM,
            "aggregation": head.get("AGGREGATION", "sum"),
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Args:
            features: (N, C, H / stride, W / stride) maps of the pyramid.
            targets: (N, H, W) int64 semantic classes, in training.

        Returns:
            In training ``(None, {"loss_sem_seg": scalar})``, in inference ``(logits, {})`` with
            (N, num_classes, H, W) logits.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, targets)
        return self.upsample(logits), {}

    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits at the common stride: (N, num_classes, H / stride, W / stride)."""
        if self.aggregation == "concat":
            levels = [getattr(self, name)(features[name]) for name in self.in_features]
            return self.predictor(torch.cat(levels, dim=1))
        # Upsampling is linear: the levels that end with it are summed first and go through it once.
        final = earlier = None
        for name in self.in_features:
            stages = getattr(self, name)
            if isinstance(stages[-1], nn.Upsample):
                earlier = _add(earlier, stages[:-1](features[name]))
            else:
                final = _add(final, stages(features[name]))
        if earlier is not None:
            final = _add(final, getattr(self, self.in_features[-1])[-1](earlier))
        return self.predictor(final)

    def upsample(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of :meth:`layers`, brought to the size of the image."""
        return F.interpolate(
            logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """λs · Ls, the cross entropy averaged over the pixels that are not ignored.

        Args:
            logits: those of :meth:`layers`.
            targets: (N, H, W) int64.
        """
        loss = upsampled_cross_entropy(
            logits.float(), targets, stride=self.common_stride, ignore_value=self.ignore_value
        )
        return {"loss_sem_seg": loss * self.loss_weight}


def logits_for_postprocessing(
    head: nn.Module, features: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Those of any semantic head in inference, of ours before they are upsampled, and their stride.

    Returns:
        (N, num_classes, H / stride, W / stride) logits; the stride.
    """
    if isinstance(head, SemanticFPNHead):
        return head.layers(features), head.common_stride
    return head(features, None)[0], 1


def _add(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The sum; in inference in the place of ``total``, which nothing else needs."""
    if total is None:
        return x
    return total + x if total.requires_grad else total.add_(x)


def _level(
    shape: ShapeSpec, conv_dims: int, common_stride: int, norm: str | Callable | None
) -> nn.Sequential:
    """The stages that bring one level to the common stride."""
    halvings = int(math.log2(shape.stride)) - int(math.log2(common_stride))
    stages: list[nn.Module] = []
    for k in range(max(1, halvings)):
        conv = Conv2d(
            shape.channels if k == 0 else conv_dims,
            conv_dims,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, conv_dims),
            activation=F.relu,
        )
        weight_init.c2_msra_fill(conv)
        stages.append(conv)
        if halvings > 0:
            stages.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*stages)
