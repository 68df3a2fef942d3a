"""Triton kernels that merge instances without a launch, or a wait, for each.

What they must equal is :mod:`~panoptic_fpn_ext.modeling.merging`'s loop.
"""

import torch
import triton
import triton.language as tl

from ..layers.mask_bits import WORDS, MaskBits

STEP = 4096  # words looked at together


@triton.jit
def _bit_count(words):
    """How many bits of each int32 are set."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


# Compiled once, not anew for numbers that are 1 or multiples of 16.
@triton.jit(do_not_specialize=["number"])
def _keep_kernel(
    bits, windows, areas, valid, taken, kept, threshold, number, height, words, STEP: tl.constexpr
):
    """The rule of merging, one instance after the other: a single program."""
    limit = tl.load(threshold)
    count = tl.full((), 0, tl.int32)
    of_instance = bits
    for i in range(0, number):
        area = tl.load(areas + i)
        left, top = tl.load(windows + i * 4), tl.load(windows + i * 4 + 1)
        right, bottom = tl.load(windows + i * 4 + 2), tl.load(windows + i * 4 + 3)
        first = left // 32
        columns = tl.maximum((right + 31) // 32 - first, 1)
        total = tl.maximum(bottom - top, 0) * columns
        total = tl.where((tl.load(valid + i) != 0) & (right > left), total, 0)
        seen = tl.zeros((STEP,), tl.int32)
        for start in range(0, total, STEP):
            k = start + tl.arange(0, STEP)
            place = (top + k // columns) * words + first + k % columns
            mine = tl.load(of_instance + place, mask=k < total, other=0)
            others = tl.load(taken + place, mask=k < total, other=0, volatile=True)
            seen += _bit_count(mine & ~others)
        visible = tl.sum(seen)  # all threads have read before one writes
        share = (area - visible).to(tl.float64) / tl.maximum(area, 1).to(tl.float64)
        # Without a visible pixel it is no segment, not even where all may overlap.
        accept = (visible > 0) & (share <= limit)
        count += accept.to(tl.int32)
        tl.store(kept + i, tl.where(accept, count, 0))
        total = tl.where(accept, total, 0)
        for start in range(0, total, STEP):
            k = start + tl.arange(0, STEP)
            place = (top + k // columns) * words + first + k % columns
            mine = tl.load(of_instance + place, mask=k < total, other=0)
            others = tl.load(taken + place, mask=k < total, other=0, volatile=True)
            tl.store(taken + place, mine | others, mask=k < total)
        tl.debug_barrier()  # the next instance reads what other threads have written
        of_instance += height * words


@triton.jit(do_not_specialize=["number"])
def _ids_kernel(
    bits, windows, kept, labels, ids, class_areas, number, num_classes, height, width, words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first kept instance of each pixel, and how many pixels of each class have none."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = word // words, word % words
    lane = tl.arange(0, 32)[None, :]
    found = tl.zeros((BLOCK, 32), tl.int32)
    of_instance = bits
    for i in range(0, number):
        id_of_instance = tl.load(kept + i)
        left, top = tl.load(windows + i * 4), tl.load(windows + i * 4 + 1)
        right, bottom = tl.load(windows + i * 4 + 2), tl.load(windows + i * 4 + 3)
        reached = (row >= top) & (row < bottom) & (column * 32 < right) & (column * 32 + 32 > left)
        reached &= id_of_instance > 0
        mine = tl.load(of_instance + word, mask=reached, other=0)
        of_instance += height * words
        has = ((mine[:, None] >> lane) & 1) != 0
        found = tl.where(has & (found == 0), id_of_instance, found)
    x = column[:, None] * 32 + lane
    inside = (x < width) & (row[:, None] < height)
    pixel = row[:, None] * width + x
    tl.store(ids + pixel, found, mask=inside)
    label = tl.load(labels + pixel, mask=inside & (found == 0), other=-1)
    for c in range(0, num_classes):
        area = tl.sum(tl.sum((label == c).to(tl.int32), axis=1), axis=0)
        tl.atomic_add(class_areas + c, area, mask=area > 0)


def merged_ids(
    masks: MaskBits,
    valid: torch.Tensor,
    labels: torch.Tensor,
    *,
    overlap_threshold: float,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Instances laid over each other.

    Args:
        masks: by descending score.
        valid: (N,) bool; the others are dropped.
        labels: (H, W) int64 semantic classes.
        overlap_threshold: see :func:`~panoptic_fpn_ext.modeling.merging.merge_panoptic`.
        num_classes: semantic ones.

    Returns:
        (N,) int32 ids from 1 on of the instances that are kept, 0 of others; the (H, W) int32 map
        of them; (num_classes,) int32 pixels of each class outside of it.
    """
    number, height, words = masks.bits.shape
    device = labels.device
    kept = torch.zeros(number, dtype=torch.int32, device=device)
    ids = torch.empty(labels.shape, dtype=torch.int32, device=device)
    class_areas = torch.zeros(num_classes, dtype=torch.int32, device=device)
    if number:
        taken = torch.zeros(height, words, dtype=torch.int32, device=device)
        # In a tensor: an argument would be rounded to single precision.
        threshold = torch.full((1,), overlap_threshold, dtype=torch.float64, device=device)
        _keep_kernel[(1,)](
            masks.bits, masks.windows, masks.areas, valid.to(torch.int8), taken, kept, threshold,
            number, height, words, STEP=STEP, num_warps=16,
        )  # fmt: skip
    _ids_kernel[(triton.cdiv(height * words, WORDS),)](
        masks.bits, masks.windows, kept, labels.contiguous(), ids, class_areas, number,
        num_classes, height, masks.width, words, BLOCK=WORDS,
    )  # fmt: skip
    return kept, ids, class_areas
