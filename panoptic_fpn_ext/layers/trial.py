"""Whether Triton kernels work on a GPU: tried once, on small examples, against plain operators."""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from detectron2.layers import paste_masks_in_image
from torch.nn import functional as F

from .stand_in import is_eager

T = TypeVar("T")

logger = logging.getLogger(__name__)


def kernels_for(*tensors: torch.Tensor) -> ModuleType | None:
    """:mod:`~panoptic_fpn_ext.layers.kernels`, if that, and :mod:`.mask_bits`, is for ``tensors``
    and works where they are: on GPUs, but not in double precision and not where somebody records
    what is done."""
    if not is_for_kernels(*tensors):
        return None
    return _tried_kernels(tensors[0].device)


def is_for_kernels(*tensors: torch.Tensor) -> bool:
    return all(x.is_cuda and x.dtype != torch.float64 for x in tensors) and is_eager(*tensors)


def tried(device: torch.device, example: Callable[[torch.device], T]) -> T | None:
    """What an example returns; None, and a warning, if it raises."""
    try:
        with torch.inference_mode(False), torch.device("cpu"):  # examples are drawn there
            return example(device)
    except Exception as error:  # what a compiler that lacks something raises is its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("Triton kernels do not work on %s (%s): plain operators", device, reason)
        return None


@functools.cache
def _tried_kernels(device: torch.device) -> ModuleType | None:
    return tried(device, _example)


def _example(device: torch.device) -> ModuleType:
    """
    Raises:
        Exception: kernels are missing, or do something else than the plain operators.
    """
    from . import kernels, mask_bits

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 6, 7, generator=generator).to(device)
    targets = torch.randint(0, 6, (1, 24, 28), generator=generator).to(device)
    full = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
    with torch.enable_grad():
        logits.requires_grad_()
        losses = [
            kernels.UpsampledCrossEntropy.apply(logits, targets, 4, 5),
            F.cross_entropy(full(logits, scale_factor=4), targets, ignore_index=5),  # no class
        ]
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)

    logits = logits.detach()
    sizes = {"stride": 4, "image_size": (23, 27), "size": (40, 30)}
    labels = kernels.upsampled_labels(logits[0], **sizes)
    plain = full(full(logits, scale_factor=4)[:, :, :23, :27], size=(40, 30))[0].argmax(dim=0)
    _assert_nearly_equal(labels, plain)

    masks = torch.rand(2, 14, 14, generator=generator).to(device)
    boxes = torch.tensor([[3.2, 4.5, 60.1, 30.0], [20.0, -3.0, 44.4, 38.7]], device=device)
    windows = torch.tensor([[2, 3, 62, 31], [19, 0, 46, 40]], dtype=torch.int32, device=device)
    bits = mask_bits.pasted_bits(masks, boxes, windows, (40, 70), 0.5)
    _assert_nearly_equal(bits.unpacked(), paste_masks_in_image(masks, boxes, (40, 70), 0.5).bool())
    torch.testing.assert_close(bits.areas.long(), bits.unpacked().sum(dim=(1, 2)))
    return kernels


def _assert_nearly_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to what rounding may turn."""
    agreement = (found == expected).float().mean().item()
    torch.testing.assert_close(agreement, 1.0, atol=0.01, rtol=0)
