"""Backbones in the layout that is fastest, with fewer operators."""

import functools
from collections.abc import Callable

import torch
from detectron2.modeling import ResNet

from ..layers.convolution import normalizations_at_once
from ..layers.fastest import fastest, magnitude
from ..layers.stand_in import StandIn, is_eager_on_cpu_in_any_precision, is_eager_on_gpu
from .backbones import DilatedResNet

# The layout is measured on so many rows of an image, a multiple, up to so many pixels.
LAYOUTS = {"planar": torch.contiguous_format, "channels last": torch.channels_last}
LAYOUT_ROWS = 32
LAYOUT_PIXELS = 2**18


class LeanBackbone(StandIn):
    """Mixin of a backbone of convolutions.

    On CPUs in inference, with ``channels_last``, it has its features in the layout that is faster
    for it on this machine: each channel in one piece, for which there is Winograd's algorithm, or
    the channels of a pixel side by side. On GPUs it finds what its normalizations fold into the
    weights of all its convolutions at once: eight operators instead of five for each.
    """

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) images to the maps of each stage in ``out_features``."""
        if is_eager_on_gpu(x):
            with normalizations_at_once(self):
                return super().forward(x)
        is_inference = not torch.is_grad_enabled()
        if self.channels_last and is_inference and is_eager_on_cpu_in_any_precision(x) and len(x):
            x = x.contiguous(memory_format=LAYOUTS[self._fastest_layout(x)])
        return super().forward(x)

    def _fastest_layout(self, x: torch.Tensor) -> str:
        plain = super().forward
        height, width = x.shape[-2:]

        def ways() -> dict[str, Callable[[], object]]:
            rows = max(LAYOUT_ROWS, LAYOUT_PIXELS // width // LAYOUT_ROWS * LAYOUT_ROWS)
            sample = x[:1, :, :rows]
            return {
                name: functools.partial(plain, sample.contiguous(memory_format=layout))
                for name, layout in LAYOUTS.items()
            }

        key = (
            *(tuple(parameter.shape) for parameter in self.parameters()),
            self.winograd,
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype,
            magnitude(height * width, LAYOUT_PIXELS),
        )
        return fastest("layout", key, ways, about=f"a backbone and images of {height}x{width}")


class LeanResNet(LeanBackbone, ResNet):
    """Detectron2's, see :class:`LeanBackbone`."""

    winograd: bool
    channels_last: bool


class LeanDilatedResNet(LeanBackbone, DilatedResNet):
    """See :class:`LeanBackbone`."""

    winograd: bool
    channels_last: bool
