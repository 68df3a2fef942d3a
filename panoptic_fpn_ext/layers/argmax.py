"""The class of each pixel."""

import torch

from .stand_in import is_eager_on_cpu

STRIP = 2**20  # logits looked at at once: they stay in the processor's cache


def argmax_classes(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(dim=0)``, the first of equals, several times as fast on CPUs in float32.

    PyTorch finds a maximum there with vector instructions, but not where it is. So each class gets
    a number, and the greatest number of those that have the maximum is found.

    Args:
        logits: (C, H, W), float.

    Returns:
        (H, W) int64.
    """
    if not is_eager_on_cpu(logits):
        return logits.max(dim=0).indices
    num_classes, height, width = logits.shape
    numbers = torch.arange(num_classes, 0, -1.0)[:, None, None]
    rows = max(1, STRIP // max(1, num_classes * width))
    classes = torch.empty(height, width, dtype=torch.int64)
    spare = torch.empty(num_classes, min(rows, height), width)
    for start in range(0, height, rows):
        strip = logits[:, start : start + rows]
        best = strip.amax(dim=0)
        if best.isnan().any():
            classes[start : start + rows] = strip.max(dim=0).indices
            continue
        # Into floats: only then vector instructions compare.
        is_best = torch.eq(strip, best, out=spare[:, : strip.shape[1]])
        number = is_best.mul_(numbers).amax(dim=0)
        classes[start : start + rows] = num_classes - number.long()
    return classes
