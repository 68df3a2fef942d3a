"""Masks of boxes brought to the image, only where and when they are needed."""

import functools
from typing import TYPE_CHECKING

import torch
from detectron2.layers import paste_masks_in_image

from .trial import kernels_for

if TYPE_CHECKING:
    from .mask_bits import MaskBits


class PastedMasks:
    """Masks of an image, each kept inside the window around its box and pasted when asked for.

    Equal to Detectron2's ``paste_masks_in_image``: bilinear sampling, zero outside. Sampling on a
    grid of rows and columns is separable, so it is two small matrix products.
    """

    def __init__(
        self,
        probabilities: torch.Tensor,
        boxes: torch.Tensor,
        size: tuple[int, int],
        threshold: float = 0.5,
    ) -> None:
        """
        Args:
            probabilities: (N, M, M) in [0, 1], over each box, of any float dtype.
            boxes: (N, 4) float, x0, y0, x1, y1 in pixels of the image.
            size: (height, width) of the image.
            threshold: a pixel is in the mask from this probability on.
        """
        self.probabilities = probabilities
        self.boxes = boxes
        self.size = size
        self.threshold = threshold
        # One pixel of margin, as Detectron2 has it.
        first, last = (boxes[:, :2].floor() - 1).clamp_(min=0), boxes[:, 2:].ceil() + 1
        for corner in (first, last):
            corner[:, 0].clamp_(max=size[1])
            corner[:, 1].clamp_(max=size[0])
        self._window_tensor = torch.cat([first, torch.maximum(first, last)], dim=1).int()
        self._dense: torch.Tensor | None = None

    @functools.cached_property
    def _exact(self) -> torch.Tensor:
        # GPUs may round what they multiply in float32 (TF32), which interpolation does not.
        return self.probabilities.to(torch.float64 if self.boxes.is_cuda else torch.float32)

    @functools.cached_property
    def _windows(self) -> list[list[int]]:
        return self._window_tensor.tolist()

    @functools.cached_property
    def _box_list(self) -> list[list[float]]:
        return self.boxes.tolist()

    @functools.cached_property
    def _positions(self) -> torch.Tensor:
        number = self.probabilities.shape[-1]
        return torch.arange(number, dtype=self._exact.dtype, device=self.boxes.device)

    def __len__(self) -> int:
        return len(self.probabilities)

    def window(self, index: int) -> tuple[tuple[slice, slice], torch.Tensor]:
        """Where a mask is, as slices of rows and columns, and the (h, w) bool mask there."""
        x0, y0, x1, y1 = self._windows[index]
        window = slice(y0, y1), slice(x0, x1)
        if self._dense is not None:
            return window, self._dense[index][window]
        mask, box = self._exact[index], self._box_list[index]
        rows = self._sampling_matrix(y0, y1, box[1], box[3])
        columns = self._sampling_matrix(x0, x1, box[0], box[2])
        return window, rows @ mask @ columns.t() >= self.threshold

    def dense(self) -> torch.Tensor:
        """All masks over the whole image, (N, height, width) bool. They are kept: from then on
        windows are parts of them."""
        if self._dense is None:
            self._dense = self._paste_all()
        return self._dense

    def bits(self, order: torch.Tensor | None = None) -> "MaskBits":
        """All masks as bits, by kernels that must work here; nothing waits for the GPU.

        Args:
            order: (M,) which of the masks; by default all.
        """
        from .mask_bits import pasted_bits  # Triton is not everywhere

        inputs = self.probabilities, self.boxes, self._window_tensor
        if order is not None:
            inputs = (x[order] for x in inputs)
        return pasted_bits(*inputs, self.size, self.threshold)

    def _paste_all(self) -> torch.Tensor:
        if kernels_for(self.boxes):
            return self.bits().unpacked()
        if self.boxes.is_cuda:  # a few large kernels there instead of many small ones
            return paste_masks_in_image(
                self.probabilities.float(), self.boxes, self.size, self.threshold
            ).bool()
        masks = torch.zeros(len(self), *self.size, dtype=torch.bool)
        for index, mask in enumerate(masks):
            window, inside = self.window(index)
            mask[window] = inside
        return masks

    def _sampling_matrix(self, first: int, last: int, start: float, end: float) -> torch.Tensor:
        """Bilinear weights (last - first, M) of the values of a box for a range of pixels."""
        scale = len(self._positions) / ((end - start) or 1e-30)
        pixels = torch.arange(
            first, last, dtype=self._positions.dtype, device=self._positions.device
        )
        position = pixels.mul_(scale).add_((0.5 - start) * scale - 0.5)
        return (1 - (position[:, None] - self._positions).abs_()).clamp_(min=0)
