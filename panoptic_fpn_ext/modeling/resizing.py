"""Semantic logits at the size of an image, without holding them all.

Detectron2 brings logits to the image in two bilinear steps, both at full resolution: up by the
head's stride, then to the size of the original image. Each step is linear and separable, so both
together are one matrix for the rows and one for the columns. The matrices are banded; applied in
blocks, they touch few inputs each, and a block of rows is reduced to labels while it is in cache.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

BLOCK = 16  # rows or columns of the output computed at once
BAND = 2**24  # values held that are upsampled along the rows only


class _Block(NamedTuple):
    """Outputs ``output`` of an axis depend on inputs ``input`` alone, through ``weights``."""

    input: slice
    output: slice
    weights: torch.Tensor  # (outputs, inputs)


def upsampled_labels(
    logits: torch.Tensor, *, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """The class of each pixel: ``upsampled(...).argmax(0)`` with memory for a few rows only.

    Args:
        logits: (C, h, w), float.
        stride: how many pixels of the network's input a logit stands for in each direction.
        image_size: (height, width) of the network's input without padding.
        size: (height, width) of the result.

    Returns:
        (height, width) int64.
    """
    labels = torch.empty(size, dtype=torch.int64, device=logits.device)
    for rows, block in _row_blocks(logits, stride, image_size, size):
        labels[rows] = block.max(dim=-1).indices
    return labels


def upsampled(
    logits: torch.Tensor, *, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Logits at the size of the original image, as Detectron2's head and postprocessing give them.

    Args:
        logits, stride, image_size, size: see :func:`upsampled_labels`.

    Returns:
        (C, height, width) logits.
    """
    result = logits.new_empty(len(logits), *size)
    for rows, block in _row_blocks(logits, stride, image_size, size):
        result[:, rows] = block.permute(2, 0, 1)
    return result


def _row_blocks(
    logits: torch.Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks (rows, width, C) of the upsampled logits, from top to bottom."""
    height, width = size
    num_classes, num_rows, num_columns = logits.shape
    where = logits.device, logits.dtype
    column_blocks = _blocks(num_columns, stride, image_size[1], width, *where)
    columns = logits.new_empty(0)
    first = last = 0  # rows of the logits that `columns` holds
    for block in _blocks(num_rows, stride, image_size[0], height, *where):
        if block.input.stop > last:
            del columns  # before the next are made
            first = block.input.start
            last = max(block.input.stop, min(num_rows, first + BAND // (width * num_classes)))
            by_pixel = logits[:, first:last].permute(1, 2, 0).contiguous()  # classes side by side
            columns = logits.new_empty(last - first, width, num_classes)
            for column_block in column_blocks:
                columns[:, column_block.output] = (
                    column_block.weights @ by_pixel[:, column_block.input]
                )
            columns = columns.flatten(1)
        rows = block.weights @ columns[block.input.start - first : block.input.stop - first]
        yield block.output, rows.view(-1, width, num_classes)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be used where there are gradients
def _blocks(
    num_inputs: int,
    stride: int,
    image_size: int,
    num_outputs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[_Block]:
    """Both bilinear steps along one axis."""
    # Interpolating the unit vectors gives the columns of the matrix of an interpolation.
    matrix = torch.eye(num_inputs)[None]
    matrix = _interpolate(matrix, num_inputs * stride)[:, :, :image_size]
    matrix = _interpolate(matrix, num_outputs)[0].t()
    blocks = []
    for first in range(0, num_outputs, BLOCK):
        weights = matrix[first : first + BLOCK]
        used = weights.any(dim=0).nonzero()
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        weights = weights[:, inputs].to(device, dtype).contiguous()
        blocks.append(_Block(inputs, slice(first, first + len(weights)), weights))
    return blocks


def _interpolate(values: torch.Tensor, length: int) -> torch.Tensor:
    return F.interpolate(values, size=length, mode="linear", align_corners=False)


def upsampled_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, stride: int, ignore_value: int
) -> torch.Tensor:
    """Mean cross entropy of bilinearly upsampled logits, with memory for a few rows of them.

    Args:
        logits: (N, C, h, w).
        targets: (N, h * stride, w * stride) int64 classes.
        stride: of the logits.
        ignore_value: pixels of this class do not count.

    Returns:
        The scalar ``F.cross_entropy(F.interpolate(logits, ...), targets)``; 0, not nan, if no
        pixel counts.
    """
    # The products here sum small weighted terms: half precision loses them.
    with torch.autocast(logits.device.type, enabled=False):
        return _UpsampledCrossEntropy.apply(logits, targets, stride, ignore_value)


class _UpsampledCrossEntropy(torch.autograd.Function):
    """The gradient is made along with the loss, block by block: nothing large is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, stride: int, ignore_value: int
    ) -> torch.Tensor:
        height, width = targets.shape[1:]
        _, num_classes, num_rows, num_columns = logits.shape
        where = logits.device, torch.float32
        row_blocks = _blocks(num_rows, stride, height, height, *where)
        column_blocks = _blocks(num_columns, stride, width, width, *where)
        by_pixel = logits.detach().float().permute(0, 2, 3, 1).contiguous()
        gradient = torch.zeros_like(by_pixel)
        counted = targets != ignore_value
        scale = 1 / counted.sum().clamp(min=1)
        loss = by_pixel.new_zeros((), dtype=torch.float64)
        columns = by_pixel.new_empty(num_rows, width, num_classes)
        for image, image_gradient, target, count in zip(
            by_pixel, gradient, targets, counted, strict=True
        ):
            for block in column_blocks:
                columns[:, block.output] = block.weights @ image[:, block.input]
            columns_gradient = torch.zeros_like(columns)
            for block in row_blocks:
                values = (block.weights @ columns[block.input].flatten(1)).view(-1, num_classes)
                classes = target[block.output].flatten()[:, None].clamp(max=num_classes - 1)
                weights = (count[block.output].flatten()[:, None] * scale).float()
                values = values.log_softmax(dim=1)
                loss -= (values.gather(1, classes) * weights).sum()
                values.exp_().scatter_add_(
                    1, classes, values.new_full((), -1).expand(classes.shape)
                )
                values *= weights
                columns_gradient[block.input].flatten(1).addmm_(
                    block.weights.t(), values.view(len(block.weights), -1)
                )
            for block in column_blocks:
                image_gradient[:, block.input] += (
                    block.weights.t() @ columns_gradient[:, block.output]
                )
        ctx.save_for_backward(gradient.permute(0, 3, 1, 2).to(logits.dtype))
        return loss.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_output, None, None, None
