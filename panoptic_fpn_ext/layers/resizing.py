"""Semantic logits at the size of an image, without holding them all.

Detectron2 brings logits to the image in two bilinear steps, both at full resolution: up by the
head's stride, then to the size of the original image. Each step is linear and separable, so both
together are one matrix for the rows and one for the columns. The matrices are banded; applied in
blocks, they touch few inputs each, and a block of rows is reduced to labels while it is in cache.
That is for CPUs. On GPUs a Triton kernel does the same for labels and for the loss. Elsewhere, and
where somebody records what is done, the two steps are taken.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..errors import UserError
from .argmax import argmax_classes
from .stand_in import is_eager_on_cpu
from .trial import kernels_for

BLOCK = 16  # rows or columns of the output computed at once, at least
# What CPUs have cache for: values in a block, as far as its size is free, and values held that are
# upsampled along the rows only.
BLOCK_VALUES = 2**18
BAND_VALUES = 2**22


class _Block(NamedTuple):
    """Outputs ``output`` of an axis depend on inputs ``input`` alone, through ``weights``."""

    input: slice
    output: slice
    weights: torch.Tensor  # (outputs, inputs)


@torch.no_grad()
def upsampled_labels(
    logits: torch.Tensor, *, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """The class of each pixel, with memory for a few rows of logits only.

    Args:
        logits: (C, h, w), float.
        stride: how many pixels of the network's input a logit stands for in each direction.
        image_size: (height, width) of the network's input without padding.
        size: (height, width) of the result.

    Returns:
        (height, width) int64.
    """
    sizes = {"stride": stride, "image_size": image_size, "size": size}
    if kernels := kernels_for(logits):
        return kernels.upsampled_labels(logits, **sizes)
    if not is_eager_on_cpu(logits.float()):
        return upsampled(logits, **sizes)[1]
    labels = torch.empty(size, dtype=torch.int64)
    for rows, block in _row_blocks(logits, stride, image_size, size):
        labels[rows] = argmax_classes(block)
    return labels


def upsampled(
    logits: torch.Tensor, *, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the size of the original image, as Detectron2's head and postprocessing give them,
    and the class of each pixel.

    Args:
        logits, stride, image_size, size: see :func:`upsampled_labels`.

    Returns:
        (C, height, width) logits and (height, width) int64 classes.
    """
    # Blocks are computed in place.
    if not is_eager_on_cpu(logits.float()) or (logits.requires_grad and torch.is_grad_enabled()):
        result = sem_seg_postprocess(_upsample(logits[None], stride)[0], image_size, *size)
        return result, argmax_classes(result.detach())
    result = logits.new_empty(len(logits), *size)
    labels = torch.empty(size, dtype=torch.int64)
    for rows, block in _row_blocks(logits, stride, image_size, size):
        result[:, rows] = block
        labels[rows] = argmax_classes(block)
    return result, labels


def _upsample(logits: torch.Tensor, stride: int) -> torch.Tensor:
    return F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=False)


def _row_blocks(
    logits: torch.Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks (C, rows, width) of the upsampled logits, from top to bottom, each valid until the
    next."""
    height, width = size
    num_classes, num_rows, num_columns = logits.shape
    dtype, logits = logits.dtype, logits.float()  # half precision is no place for products
    block_size = max(BLOCK, BLOCK_VALUES // (width * num_classes))
    row_blocks = _blocks(num_rows, stride, image_size[0], height, block_size)
    column_blocks = _blocks(num_columns, stride, image_size[1], width, block_size)
    band_rows = max(block.input.stop - block.input.start for block in row_blocks)
    band_rows = min(num_rows, max(band_rows, BAND_VALUES // (width * num_classes)))
    # Memory is taken once: the system is slow to give it.
    columns_buffer = logits.new_empty(num_classes * band_rows, width)
    rows_buffer = logits.new_empty(num_classes, min(block_size, height), width)
    first = last = 0  # rows of the logits that `columns` holds
    for block in row_blocks:
        if block.input.stop > last:
            first = block.input.start
            last = min(num_rows, first + band_rows)
            band = logits[:, first:last].flatten(0, 1)
            columns = columns_buffer[: len(band)]
            for columns_block in column_blocks:
                torch.mm(
                    band[:, columns_block.input],
                    columns_block.weights.t(),
                    out=columns[:, columns_block.output],
                )
            columns = columns.view(num_classes, last - first, width)
        rows = rows_buffer[:, : len(block.weights)]
        inputs = columns[:, block.input.start - first : block.input.stop - first]
        torch.bmm(block.weights.expand(num_classes, -1, -1), inputs, out=rows)
        if dtype != torch.float32:  # labels are those of the logits that are returned
            rows.copy_(rows.to(dtype))
        yield block.output, rows


@functools.lru_cache(maxsize=256)  # they are small
def _blocks(
    num_inputs: int, stride: int, image_size: int, num_outputs: int, block_size: int
) -> list[_Block]:
    """Both bilinear steps along one axis."""
    # Interpolating the unit vectors gives the columns of the matrix of an interpolation.
    matrix = torch.eye(num_inputs)[None]
    matrix = _interpolate(matrix, num_inputs * stride)[:, :, :image_size]
    matrix = _interpolate(matrix, num_outputs)[0].t()
    blocks = []
    for first in range(0, num_outputs, block_size):
        weights = matrix[first : first + block_size]
        used = weights.any(dim=0).nonzero()
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        weights = weights[:, inputs].contiguous()
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

    Raises:
        UserError: on CPUs, a target that is neither a class nor ignored.
    """
    # Small weighted terms are summed: half precision loses them.
    with torch.autocast(logits.device.type, enabled=False):
        if kernels := kernels_for(logits):
            return kernels.UpsampledCrossEntropy.apply(logits, targets, stride, ignore_value)
        logits = logits.float()
        counted = targets != ignore_value
        number = counted.sum().clamp(min=1)
        if is_eager_on_cpu(logits):
            _check_targets(targets[counted], logits.shape[1], ignore_value)
            return _UpsampledCrossEntropy.apply(logits, targets, counted, number, stride)
        full = _upsample(logits, stride)
        return F.cross_entropy(full, targets, ignore_index=ignore_value, reduction="sum") / number


def _check_targets(targets: torch.Tensor, num_classes: int, ignore_value: int) -> None:
    if not len(targets):
        return
    for label in map(int, targets.aminmax()):
        if not 0 <= label < num_classes:
            raise UserError(
                f"label {label} in sem_seg is neither one of MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                f"{num_classes} classes nor MODEL.SEM_SEG_HEAD.IGNORE_VALUE {ignore_value}"
            )


class _UpsampledCrossEntropy(torch.autograd.Function):
    """The gradient is made along with the loss, block by block: nothing large is kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        number: torch.Tensor,
        stride: int,
    ) -> torch.Tensor:
        height, width = targets.shape[1:]
        _, num_classes, num_rows, num_columns = logits.shape
        row_blocks = _blocks(num_rows, stride, height, height, BLOCK)
        column_blocks = _blocks(num_columns, stride, width, width, BLOCK)
        by_pixel = logits.detach().permute(0, 2, 3, 1).contiguous()
        gradient = torch.zeros_like(by_pixel)
        loss = by_pixel.new_zeros((), dtype=torch.float64)
        columns = by_pixel.new_empty(num_rows, width, num_classes)
        weights_of_pixels = counted / number
        classes_of_pixels = targets.where(counted, 0)
        for image, image_gradient, classes_of_image, weights_of_image in zip(
            by_pixel, gradient, classes_of_pixels, weights_of_pixels, strict=True
        ):
            for block in column_blocks:
                columns[:, block.output] = block.weights @ image[:, block.input]
            columns_gradient = torch.zeros_like(columns)
            for block in row_blocks:
                values = (block.weights @ columns[block.input].flatten(1)).view(-1, num_classes)
                classes = classes_of_image[block.output].reshape(-1, 1)
                weights = weights_of_image[block.output].reshape(-1, 1)
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
        ctx.save_for_backward(gradient.permute(0, 3, 1, 2))
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_output, None, None, None, None
