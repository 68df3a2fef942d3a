"""Triton kernels for GPUs: upsampled logits that are never in memory.

Beside each kernel stands, in :mod:`~panoptic_fpn_ext.layers.resizing`, what it must equal. With
``TRITON_INTERPRET=1`` in the environment they run on CPUs, for tests. This module is imported only
where it is used: Triton comes with PyTorch for GPUs, but not everywhere.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

PIXELS = 256  # of the upsampled image in a program
CELLS, CLASSES = 32, 16  # logits in a program


@triton.jit
def _taps(position, scale, length):
    """Bilinear taps of ``F.interpolate(align_corners=False)``: two indices and the second's weight.

    Args:
        position: where along the output.
        scale: inputs per output.
        length: of the input.
    """
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), length - 1)
    second = tl.minimum(first + 1, length - 1)
    return first, second, source - first.to(tl.float32)


@triton.jit
def _interpolated(logits, y0, y1, wy, x0, x1, wx, stride_y, stride_x, mask):
    """Bilinear values of one class at some pixels, in float32."""
    top = tl.load(logits + y0 * stride_y + x0 * stride_x, mask=mask, other=0.0).to(tl.float32)
    top1 = tl.load(logits + y0 * stride_y + x1 * stride_x, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(logits + y1 * stride_y + x0 * stride_x, mask=mask, other=0.0).to(tl.float32)
    low1 = tl.load(logits + y1 * stride_y + x1 * stride_x, mask=mask, other=0.0).to(tl.float32)
    top = top * (1 - wx) + top1 * wx
    low = low * (1 - wx) + low1 * wx
    return top * (1 - wy) + low * wy


@triton.jit
def _loss_kernel(
    logits,
    targets,
    normalizers,
    losses,
    counts,
    num_classes,
    rows,
    columns,
    height,
    width,
    scale,
    ignore_value,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
):
    """The logarithm of the softmax's denominator at each pixel; of each block of pixels the sum of
    the losses, and how many count."""
    block, image = tl.program_id(0), tl.program_id(1)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    y0, y1, wy = _taps(pixel // width, scale, rows)
    x0, x1, wx = _taps(pixel % width, scale, columns)
    target = tl.load(targets + image * height * width + pixel, mask=inside, other=ignore_value)
    counted = inside & (target != ignore_value)
    base = logits + image.to(tl.int64) * stride_n
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    of_target = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, num_classes):
        value = _interpolated(
            base + c * stride_c, y0, y1, wy, x0, x1, wx, stride_y, stride_x, inside
        )
        new_greatest = tl.maximum(greatest, value)
        total = total * tl.exp(greatest - new_greatest) + tl.exp(value - new_greatest)
        greatest = new_greatest
        of_target = tl.where(target == c, value, of_target)
    normalizer = greatest + tl.log(total)
    tl.store(normalizers + image * height * width + pixel, normalizer, mask=inside)
    place = image * tl.num_programs(0) + block
    tl.store(losses + place, tl.sum(tl.where(counted, normalizer - of_target, 0.0)))
    tl.store(counts + place, tl.sum(counted.to(tl.int32)))


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    normalizers,
    factor,
    gradient,
    num_classes,
    rows,
    columns,
    height,
    width,
    stride,
    scale,
    ignore_value,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """The gradient of some classes at some cells, gathered from the pixels that they have a part
    in: no atomics, so that the same comes out each time."""
    image = tl.program_id(2)
    cell = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = (tl.program_id(1) * CLASSES + tl.arange(0, CLASSES))[None, :]
    row, column = cell // columns, cell % columns
    base = logits + image.to(tl.int64) * stride_n + c * stride_c
    total = tl.zeros((BLOCK, CLASSES), tl.float32)
    # A cell is a tap of the pixels less than a stride from its middle, and at the border of those
    # beyond it.
    reach = (stride + 1) // 2
    for dy in range(-reach, stride + reach):
        y = row * stride + dy
        y0, y1, wy = _taps(y, scale, rows)
        weight_y = tl.where(y0 == row, 1 - wy, 0.0) + tl.where(y1 == row, wy, 0.0)
        for dx in range(-reach, stride + reach):
            x = column * stride + dx
            x0, x1, wx = _taps(x, scale, columns)
            weight = weight_y * (
                tl.where(x0 == column, 1 - wx, 0.0) + tl.where(x1 == column, wx, 0.0)
            )
            valid = (cell < rows * columns) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = image * height * width + y * width + x
            target = tl.load(targets + pixel, mask=valid, other=ignore_value)
            counted = valid & (target != ignore_value)
            normalizer = tl.load(normalizers + pixel, mask=counted, other=0.0)
            mask = counted & (c < num_classes)
            value = _interpolated(base, y0, y1, wy, x0, x1, wx, stride_y, stride_x, mask)
            error = tl.exp(value - normalizer) - tl.where(target == c, 1.0, 0.0)
            total += tl.where(mask, weight * error, 0.0)
    place = (image.to(tl.int64) * num_classes + c) * rows * columns + cell
    mask = (cell < rows * columns) & (c < num_classes)
    tl.store(gradient + place, total * tl.load(factor), mask=mask)


@triton.jit
def _labels_kernel(
    logits,
    labels,
    num_classes,
    rows,
    columns,
    image_height,
    image_width,
    height,
    width,
    scale,
    scale_y,
    scale_x,
    stride_c,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
):
    """The class of each pixel after both bilinear steps of Detectron2."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    top, low, wy = _taps(pixel // width, scale_y, image_height)
    left, right, wx = _taps(pixel % width, scale_x, image_width)
    top0, top1, wtop = _taps(top, scale, rows)
    low0, low1, wlow = _taps(low, scale, rows)
    left0, left1, wleft = _taps(left, scale, columns)
    right0, right1, wright = _taps(right, scale, columns)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    label = tl.zeros((BLOCK,), tl.int64)
    for c in range(0, num_classes):
        base = logits + c * stride_c
        a = _interpolated(base, top0, top1, wtop, left0, left1, wleft, stride_y, stride_x, inside)
        b = _interpolated(
            base, top0, top1, wtop, right0, right1, wright, stride_y, stride_x, inside
        )
        upper = a * (1 - wx) + b * wx
        a = _interpolated(base, low0, low1, wlow, left0, left1, wleft, stride_y, stride_x, inside)
        b = _interpolated(
            base, low0, low1, wlow, right0, right1, wright, stride_y, stride_x, inside
        )
        value = upper * (1 - wy) + (a * (1 - wx) + b * wx) * wy
        # The first of equals; what is not a number wins, as in PyTorch.
        better = (value > best) | ((value != value) & (best == best))
        label = tl.where(better, c, label)
        best = tl.where(better, value, best)
    tl.store(labels + pixel, label, mask=inside)


class UpsampledCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropy of upsampled logits over their number, in one kernel each for
    the loss and for its gradient."""

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, targets: torch.Tensor, stride: int, ignore_value: int
    ) -> torch.Tensor:
        """
        Args:
            logits: (N, C, h, w), of any float dtype and memory layout.
            targets: (N, h * stride, w * stride) int64.
            stride: of the logits.
            ignore_value: targets of this value do not count.

        Returns:
            The mean over the targets that count, float32; 0 if none does.
        """
        number, num_classes, rows, columns = logits.shape
        height, width = targets.shape[1:]
        targets = targets.contiguous()
        blocks = triton.cdiv(height * width, PIXELS)
        normalizers = logits.new_empty(number, height, width, dtype=torch.float32)
        losses = logits.new_empty(number * blocks, dtype=torch.float32)
        counts = logits.new_empty(number * blocks, dtype=torch.int32)
        _loss_kernel[(blocks, number)](
            logits, targets, normalizers, losses, counts, num_classes, rows, columns,
            height, width, 1 / stride, ignore_value, *logits.stride(), BLOCK=PIXELS,
        )  # fmt: skip
        number_counted = counts.sum().clamp(min=1)
        ctx.save_for_backward(logits, targets, normalizers, number_counted)
        ctx.stride, ctx.ignore_value = stride, ignore_value
        return losses.sum() / number_counted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, normalizers, number_counted = ctx.saved_tensors
        number, num_classes, rows, columns = logits.shape
        height, width = targets.shape[1:]
        gradient = logits.new_empty(logits.shape)
        factor = grad_output.float() / number_counted
        grid = triton.cdiv(rows * columns, CELLS), triton.cdiv(num_classes, CLASSES), number
        _gradient_kernel[grid](
            logits, targets, normalizers, factor, gradient, num_classes, rows, columns,
            height, width, ctx.stride, 1 / ctx.stride, ctx.ignore_value, *logits.stride(),
            BLOCK=CELLS, CLASSES=CLASSES,
        )  # fmt: skip
        return gradient, None, None, None


def upsampled_labels(
    logits: torch.Tensor, *, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """The class of each pixel, straight from the logits.

    Args, returns: see :func:`panoptic_fpn_ext.layers.resizing.upsampled_labels`.
    """
    num_classes, rows, columns = logits.shape
    labels = torch.empty(size, dtype=torch.int64, device=logits.device)
    scales = (source / target for source, target in zip(image_size, size, strict=True))
    _labels_kernel[(triton.cdiv(labels.numel(), PIXELS),)](
        logits, labels, num_classes, rows, columns, *image_size, *size, 1 / stride, *scales,
        *logits.stride(), BLOCK=PIXELS,
    )  # fmt: skip
    return labels
