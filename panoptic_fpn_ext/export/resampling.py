"""Resizing of pixels as Pillow does it, bit for bit, in PyTorch, to be traced.

Detectron2 resizes 8-bit images by Pillow: bilinear, with as many input pixels under an output pixel
as shrinking takes (antialiasing), in fixed point, along the rows and then along the columns, each
rounded to 8 bits (Pillow's ``Resample.c``).
"""

import torch

SCALE = 2**22  # of Pillow's weights; what is scripted has it, and a half, as a literal


def resized(image: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """``Image.resize`` with ``BILINEAR``.

    Args:
        image: (H, W, C) uint8.
        size: (2,) int64, height and width of the result.

    Returns:
        (height, width, C) uint8.
    """
    height, width = torch._shape_as_tensor(image)[:2]
    # Columns as rows: what is gathered then is one piece of memory each.
    columns = _rows(image.transpose(0, 1), size[1], *_taps(width, size[1]))
    return _rows(columns.transpose(0, 1), size[0], *_taps(height, size[0]))


def _taps(length: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which inputs outputs depend on, and how much: Pillow's ``precompute_coeffs``.

    Args:
        length: inputs along the axis.
        number: outputs.

    Returns:
        (taps, outputs) int64 inputs of each; (taps, outputs) int32 weights of them.
    """
    length = length.double().reshape(1)  # PyTorch's exporter makes scalars float32
    scale = length / number.double().reshape(1)
    support = scale.clamp(min=1)
    center = (torch.arange(number).double() + 0.5) * scale
    first = (center - support + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + support + 0.5).floor(), length)
    place = torch.arange((2 * support[0]).ceil().long()).double()[:, None] + first
    weights = (1 - ((place - center + 0.5) / support).abs()).clamp(min=0)
    weights = weights * (place < last)
    weights = weights / weights.sum(dim=0)
    place = torch.minimum(place, length - 1)
    return place.long(), (weights * SCALE + 0.5).floor().int()


@torch.jit.script_if_tracing
def _rows(
    image: torch.Tensor, number: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if int(image.size(0)) != int(number):
        total = torch.zeros_like(image[:1], dtype=torch.int32) + 2097152
        for k in range(weights.size(0)):
            pixels = image.index_select(0, places[k]).to(torch.int32)
            total = total + pixels * weights[k].unsqueeze(1).unsqueeze(1)
        image = torch.div(total, 4194304, rounding_mode="trunc").to(torch.uint8)
    return image
