"""Masks as bits, and the Triton kernels that make them on GPUs.

They must equal what :mod:`~panoptic_fpn_ext.layers.pasting` does. As
:mod:`~panoptic_fpn_ext.layers.kernels`, this is imported only where it is used.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

PIXELS = 256  # of a mask, in a program
WORDS = 32  # of 32 pixels of a mask, in a program


@triton.jit
def _paste_kernel(
    probabilities, boxes, windows, bits, areas, height, words, side, threshold,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some words of a mask: which of 32 pixels in a row belong to it. All in its window count."""
    instance = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left, top = tl.load(windows + instance * 4), tl.load(windows + instance * 4 + 1)
    right, bottom = tl.load(windows + instance * 4 + 2), tl.load(windows + instance * 4 + 3)
    row = word // words
    wanted = (row >= top) & (row < bottom)
    if tl.max(wanted.to(tl.int32)) * (right - left) > 0:
        x0, y0 = tl.load(boxes + instance * 4), tl.load(boxes + instance * 4 + 1)
        x1, y1 = tl.load(boxes + instance * 4 + 2), tl.load(boxes + instance * 4 + 3)
        lane = tl.arange(0, 32)[None, :]
        x = (word % words)[:, None] * 32 + lane
        inside = wanted[:, None] & (x >= left) & (x < right)
        # As F.grid_sample, zero outside.
        across = ((x.to(tl.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1 + 1) * side / 2 - 0.5
        down = ((row.to(tl.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1 + 1) * side / 2 - 0.5
        column_float, line_float = tl.floor(across), tl.floor(down)[:, None]
        wx, wy = across - column_float, down[:, None] - line_float
        column, line = column_float.to(tl.int32), line_float.to(tl.int32)
        base = probabilities + instance * side * side + line * side + column
        left_in, right_in = (column >= 0) & (column < side), (column >= -1) & (column < side - 1)
        upper_in, lower_in = (line >= 0) & (line < side), (line >= -1) & (line < side - 1)
        value = tl.load(base, mask=inside & upper_in & left_in, other=0.0) * (1 - wx) * (1 - wy)
        value += tl.load(base + 1, mask=inside & upper_in & right_in, other=0.0) * wx * (1 - wy)
        value += tl.load(base + side, mask=inside & lower_in & left_in, other=0.0) * (1 - wx) * wy
        value += tl.load(base + side + 1, mask=inside & lower_in & right_in, other=0.0) * wx * wy
        bit = (inside & (value >= threshold)).to(tl.int32)
        place = instance.to(tl.int64) * height * words + word
        tl.store(bits + place, tl.sum(bit << lane, axis=1), mask=wanted)
        tl.atomic_add(areas + instance, tl.sum(tl.sum(bit, axis=1), axis=0))


@triton.jit
def _unpack_kernel(bits, windows, masks, height, width, words, BLOCK: tl.constexpr):
    """Some pixels of a mask, each a byte."""
    instance = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel // width, pixel % width
    inside = (x >= tl.load(windows + instance * 4)) & (y >= tl.load(windows + instance * 4 + 1))
    inside &= (x < tl.load(windows + instance * 4 + 2)) & (y < tl.load(windows + instance * 4 + 3))
    place = instance.to(tl.int64) * height * words + y * words + x // 32
    bit = (tl.load(bits + place, mask=inside, other=0) >> (x % 32)) & 1
    place = instance.to(tl.int64) * height * width + pixel
    tl.store(masks + place, bit.to(tl.int8), mask=pixel < height * width)


class MaskBits(NamedTuple):
    """Masks of an image as words of 32 pixels each, in memory only as good as their windows."""

    bits: torch.Tensor
    """(N, height, words) int32; undefined outside of the windows' rows."""
    windows: torch.Tensor
    """(N, 4) int32: left, top, right and bottom of the pixels that a mask may have."""
    areas: torch.Tensor
    """(N,) int32: the pixels of each."""
    width: int
    """Of the image; ``words`` hold it."""

    def unpacked(self) -> torch.Tensor:
        """(N, height, width) bool masks."""
        number, height, words = self.bits.shape
        masks = torch.empty(number, height, self.width, dtype=torch.int8, device=self.bits.device)
        if number:
            grid = triton.cdiv(height * self.width, PIXELS), number
            _unpack_kernel[grid](
                self.bits, self.windows, masks, height, self.width, words, BLOCK=PIXELS
            )
        return masks.view(torch.bool)


def pasted_bits(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    windows: torch.Tensor,
    size: tuple[int, int],
    threshold: float,
) -> MaskBits:
    """Masks over boxes brought to the image, as Detectron2's ``paste_masks_in_image`` does.

    Args:
        probabilities: (N, M, M), over each box.
        boxes: (N, 4) float, x0, y0, x1, y1 in pixels of the image.
        windows: (N, 4) int32, see :class:`MaskBits`.
        size: (height, width) of the image.
        threshold: a pixel is in the mask from this probability on.
    """
    height, width = size
    number, words = len(boxes), triton.cdiv(width, 32)
    bits = torch.empty(number, height, words, dtype=torch.int32, device=boxes.device)
    areas = torch.zeros(number, dtype=torch.int32, device=boxes.device)
    if number:
        grid = triton.cdiv(height * words, WORDS), number
        _paste_kernel[grid](
            probabilities.float().contiguous(), boxes.float().contiguous(), windows.contiguous(),
            bits, areas, height, words, probabilities.shape[-1], threshold, BLOCK=WORDS,
        )  # fmt: skip
    return MaskBits(bits, windows.contiguous(), areas, width)


def packed_bits(masks: torch.Tensor) -> MaskBits:
    """(N, height, width) bool masks as words."""
    number, height, width = masks.shape
    words = triton.cdiv(width, 32)
    lanes = torch.arange(32, device=masks.device, dtype=torch.int32)
    padded = F.pad(masks, (0, words * 32 - width)).unflatten(2, (words, 32))
    bits = (padded.int() << lanes).sum(dim=3, dtype=torch.int32)
    window = torch.tensor([0, 0, width, height], dtype=torch.int32, device=masks.device)
    areas = masks.flatten(1).sum(dim=1, dtype=torch.int32)
    return MaskBits(bits, window.expand(number, 4).contiguous(), areas, width)
