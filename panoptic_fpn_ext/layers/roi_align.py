"""RoIAlign on all cores."""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.layers import ROIAlign
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from .stand_in import StandIn, is_eager_on_cpu

MIN_PARALLEL_VALUES = 2**19  # of the result; from there on threads are worth their start


class ParallelROIAlign(StandIn, ROIAlign):
    """Detectron2's, which on CPUs computes with one thread, with all of them in inference."""

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features and (K, 5) boxes, after the index of each's image, to
        (K, C, *output_size)."""
        if not torch.jit.is_scripting() and self._is_parallel(input, rois):
            return self._in_threads(input, rois)
        return roi_align(
            input,
            rois.to(dtype=input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )

    @torch.jit.unused
    def _is_parallel(self, input: torch.Tensor, rois: torch.Tensor) -> bool:
        values = len(rois) * input.shape[1] * math.prod(_pair(self.output_size))
        is_inference = not torch.is_grad_enabled()
        return is_inference and is_eager_on_cpu(input) and values >= MIN_PARALLEL_VALUES

    @torch.jit.unused
    def _in_threads(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        number = torch.get_num_threads()
        plain = super().forward

        @torch.no_grad()  # threads have a mode of their own
        def align(part: torch.Tensor) -> torch.Tensor:
            return plain(input, part)

        with ThreadPoolExecutor(number) as threads:
            return torch.cat([*threads.map(align, rois.chunk(number))])
