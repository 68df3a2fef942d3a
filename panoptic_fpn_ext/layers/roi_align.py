"""RoIAlign on all cores."""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.layers import ROIAlign
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from .stand_in import StandIn, is_eager_on_cpu_in_any_precision

MIN_PARALLEL_VALUES = 2**19  # of the result; from there on threads are worth their start


class ParallelROIAlign(StandIn, ROIAlign):
    """Detectron2's, which on CPUs computes with one thread, with all of them in inference.

    In bfloat16 Detectron2 rounds boxes to it, too, at 1,000 pixels to multiples of 4; in inference
    on CPUs this one does not. On GPUs the deterministic mode of PyTorch does not change it.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features and (K, 5) boxes, after the index of each's image, to
        (K, C, *output_size)."""
        if not torch.jit.is_scripting() and self._is_parallel(input):
            return self._in_threads(input, rois)
        if not torch.jit.is_scripting() and self._would_be_compiled(input):
            return self._in_kernel(input, rois)
        return roi_align(
            input,
            rois.to(dtype=input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )

    @torch.jit.unused
    def _is_parallel(self, input: torch.Tensor) -> bool:
        return not torch.is_grad_enabled() and is_eager_on_cpu_in_any_precision(input)

    @torch.jit.unused
    def _would_be_compiled(self, input: torch.Tensor) -> bool:
        """torchvision compiles one in Python for each new shape, minutes in a training."""
        return torch.are_deterministic_algorithms_enabled() and input.is_cuda

    @torch.jit.unused
    def _in_kernel(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """By the kernel, of whose gradient PyTorch says that it is not deterministic."""
        return torch.ops.torchvision.roi_align(
            input,
            rois.to(dtype=input.dtype),
            self.spatial_scale,
            *_pair(self.output_size),
            self.sampling_ratio,
            self.aligned,
        )

    @torch.jit.unused
    def _in_threads(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        features = input if input.dtype == torch.float64 else input.float()
        plain = super().forward

        @torch.no_grad()  # threads have a mode of their own
        def align(part: torch.Tensor) -> torch.Tensor:
            return plain(features, part)

        values = len(rois) * input.shape[1] * math.prod(_pair(self.output_size))
        number = torch.get_num_threads()
        if number == 1 or values < MIN_PARALLEL_VALUES:
            return align(rois).to(input.dtype)
        with ThreadPoolExecutor(number) as threads:
            return torch.cat([*threads.map(align, rois.chunk(number))]).to(input.dtype)
