"""Making a Detectron2 model faster or leaner; its parameters stay, and up to rounding its results.

:func:`accelerate` works for any model of Detectron2, see docs/ACCELERATION.md.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from ..layers.convolution import FastConv2d, FastConvNorm2d, convolve
from ..layers.fastest import fastest
from ..layers.roi_align import ParallelROIAlign
from ..layers.stand_in import StandIn
from .fixed_part import FixedPart
from .lean import (
    LeanBoxPredictor,
    LeanMaskHead,
    LeanROIPooler,
    LeanRPN,
    LeanRPNHead,
)
from .lean_backbone import LeanDilatedResNet, LeanResNet

AUTO = "auto"
PRECISIONS = {AUTO: None, "float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}

STAND_INS = (
    FastConv2d,
    FastConvNorm2d,
    ParallelROIAlign,
    LeanResNet,
    LeanDilatedResNet,
    LeanRPN,
    LeanRPNHead,
    LeanROIPooler,
    LeanBoxPredictor,
    LeanMaskHead,
)


def accelerate(
    model: nn.Module,
    *,
    winograd: bool = True,
    fold_batch_norm: bool = True,
    channels_last: bool = True,
) -> nn.Module:
    """Put faster or leaner modules in the place of convolutions and of Detectron2's ResNet, RPN,
    RoI pooling, box predictor and mask head.

    Names, shapes and identity of parameters and buffers stay: an optimizer made before goes on.
    What is put in can be copied, pickled, traced, scripted, compiled and counted as what was there;
    all but eager computation goes the plain way.

    Args:
        model: any model of Detectron2's layers; changed in place. Accelerated again, it has the
            last settings.
        winograd: see :func:`~panoptic_fpn_ext.layers.convolution.convolve`.
        fold_batch_norm, channels_last: see
            :class:`~panoptic_fpn_ext.layers.convolution.FastConvNorm2d`.

    Returns:
        ``model``; or its stand-in, if it is itself a module that is replaced.
    """
    settings = {
        "winograd": winograd,
        "fold_batch_norm": fold_batch_norm,
        "channels_last": channels_last,
    }
    classes = {cls.stands_in_for(): cls for cls in STAND_INS} | {cls: cls for cls in STAND_INS}
    plain = [module for module in model.modules() if type(module) in classes]
    return _replaced(model, {m: classes[type(m)].of(m, **settings) for m in plain})


def decelerate(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`.

    Returns:
        ``model``; or what it stands in for, if it is itself a stand-in.
    """
    stand_ins = [module for module in model.modules() if isinstance(module, StandIn)]
    return _replaced(model, {module: module.plain() for module in stand_ins})


def _replaced(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put the values of ``replacements`` in the places of its keys."""

    def new(value: object) -> object:
        return replacements.get(value, value) if isinstance(value, nn.Module) else value

    for module in [*map(new, model.modules())]:
        attributes = vars(module)
        attributes["_modules"].update({k: new(v) for k, v in attributes["_modules"].items()})
        # FPN and mask heads have their children in plain lists too.
        lists = {k: v for k, v in attributes.items() if type(v) is list}
        attributes.update({k: [*map(new, v)] for k, v in lists.items()})
    return new(model)


@dataclass(frozen=True)
class Acceleration:
    """``MODEL.ACCELERATION``: what makes a model faster, with the same results up to rounding.

    Attributes:
        winograd, fold_batch_norm, channels_last: see :func:`accelerate`.
        precision: of inference: ``"float32"``, or ``"float16"`` or ``"bfloat16"`` for what autocast
            has in that precision; ``"auto"`` for bfloat16 on CPUs that are faster in it, float32
            elsewhere.
        cuda_graphs, compiled: of inference, see :class:`FixedPart`.
    """

    winograd: bool = True
    fold_batch_norm: bool = True
    channels_last: bool = True
    precision: str = "float32"
    cuda_graphs: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(
                f"MODEL.ACCELERATION.PRECISION {self.precision!r}: allowed are {[*PRECISIONS]}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Acceleration":
        keys = cfg.MODEL.ACCELERATION
        return cls(
            winograd=keys.WINOGRAD,
            fold_batch_norm=keys.FOLD_BN,
            channels_last=keys.CHANNELS_LAST,
            precision=keys.PRECISION,
            cuda_graphs=keys.CUDA_GRAPHS,
            compiled=keys.COMPILE,
        )

    def apply(self, model: nn.Module) -> None:
        """:func:`accelerate` a model that is none of the modules that are replaced."""
        accelerate(
            model,
            winograd=self.winograd,
            fold_batch_norm=self.fold_batch_norm,
            channels_last=self.channels_last,
        )

    def fixed_part(self) -> FixedPart:
        """What runs the part of inference whose shapes follow from the size of the images."""
        return FixedPart(cuda_graphs=self.cuda_graphs, compiled=self.compiled)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context of inference."""
        precision = self.precision
        if precision == AUTO:
            precision = _fastest_precision() if device.type == "cpu" else "float32"
        dtype = PRECISIONS[precision]
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@torch.no_grad()
def _fastest_precision() -> str:
    """Measured on a convolution and a linear layer as the network has them."""

    def ways() -> dict[str, Callable[[], Any]]:
        features = torch.ones(1, 128, 64, 64)
        weight = torch.ones(128, 128, 3, 3)
        rows, matrix = torch.ones(256, 2048), torch.ones(1024, 2048)
        geometry = (1, 1), (1, 1), (1, 1), 1
        layout = {"memory_format": torch.channels_last}

        def in_float32() -> None:
            convolve(features, weight, None, *geometry, winograd=True)
            F.linear(rows, matrix)

        def in_bfloat16() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                F.conv2d(features.contiguous(**layout), weight, None, *geometry)
                F.linear(rows, matrix)

        return {"float32": in_float32, "bfloat16": in_bfloat16}

    return fastest("precision", (), ways, about="a network")


def on_own_gpu(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a model with the GPU that it is on, if any, as the current one: that is where
    kernels and graphs run."""

    @functools.wraps(forward)
    def on_gpu(self: nn.Module, *args: Any, **options: Any) -> Any:
        if self.device.type != "cuda":
            return forward(self, *args, **options)
        with torch.cuda.device(self.device):
            return forward(self, *args, **options)

    return on_gpu


def planar(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features with each channel in one piece, as RoIAlign wants them; it would copy them anew for
    every head and cascade stage."""
    return {name: feature.contiguous() for name, feature in features.items()}
