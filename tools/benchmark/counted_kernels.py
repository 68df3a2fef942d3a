"""What stands for our Triton kernels where there is no GPU and launches are counted.

Each does with plain operators, which do not count, what a kernel does in one launch.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.nn import functional as F

from panoptic_fpn_ext.layers import kernels, mask_bits, pasting, resizing
from panoptic_fpn_ext.layers.pasting import PastedMasks
from panoptic_fpn_ext.modeling import merging, merging_kernels, postprocessing


@contextlib.contextmanager
def as_kernels(launched: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Within it our model takes its kernels on a CPU.

    Args:
        launched: counts a launch; within its context nothing else counts.
    """

    class Kernel:
        def __init__(self, function: Callable) -> None:
            self._function = function

        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            def launch(*args, **options) -> None:
                with launched():
                    self._function(*args)

            return launch

    with contextlib.ExitStack() as stack:
        for module, name, stands_in in (
            (kernels, "_loss_kernel", _loss),
            (kernels, "_gradient_kernel", _gradient),
            (kernels, "_labels_kernel", _labels),
            (mask_bits, "_paste_kernel", _paste),
            (merging_kernels, "_keep_kernel", _keep),
            (merging_kernels, "_ids_kernel", _ids),
        ):
            stack.enter_context(mock.patch.object(module, name, Kernel(stands_in)))
        for module in (resizing, pasting):
            stack.enter_context(mock.patch.object(module, "kernels_for", lambda *x: kernels))
        for module in (merging, postprocessing):
            stack.enter_context(mock.patch.object(module, "merges_at_once", lambda x: True))
        yield


def _upsampled(logits: torch.Tensor, scale: float) -> torch.Tensor:
    return F.interpolate(
        logits.float(), scale_factor=round(1 / scale), mode="bilinear", align_corners=False
    )


def _loss(logits, targets, normalizers, losses, counts, *sizes) -> None:
    scale, ignore_value = sizes[5], sizes[6]
    full = _upsampled(logits, scale)
    normalizers.copy_(full.logsumexp(dim=1))
    losses.zero_()[0] = F.cross_entropy(full, targets, ignore_index=ignore_value, reduction="sum")
    counts.zero_()[0] = (targets != ignore_value).sum()


def _gradient(logits, targets, normalizers, factor, gradient, *sizes) -> None:
    scale, ignore_value = sizes[6], sizes[7]
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        full = _upsampled(leaf, scale)
        loss = F.cross_entropy(full, targets, ignore_index=ignore_value, reduction="sum")
        gradient.copy_(torch.autograd.grad(loss, leaf)[0] * factor)


def _labels(logits, labels, num_classes, rows, columns, image_height, image_width, *sizes) -> None:
    full = _upsampled(logits[None], sizes[2])[:, :, :image_height, :image_width]
    full = F.interpolate(full, size=labels.shape, mode="bilinear", align_corners=False)
    labels.copy_(full[0].argmax(dim=0))


def _paste(probabilities, boxes, windows, bits, areas, height, words, side, threshold) -> None:
    masks = torch.zeros(len(boxes), height, 32 * words, dtype=torch.bool)
    pasted = PastedMasks(probabilities, boxes, (height, int(windows[:, 2].max())), threshold)
    for index, mask in enumerate(masks):
        window, inside = pasted.window(index)
        mask[window] = inside
    packed = mask_bits.packed_bits(masks)
    bits.copy_(packed.bits)
    areas.copy_(packed.areas)


def _masks(bits: torch.Tensor) -> torch.Tensor:
    lanes = torch.arange(32, dtype=torch.int32)
    return ((bits[..., None] >> lanes) & 1).bool().flatten(-2)


def _keep(bits, windows, areas, valid, taken, kept, threshold, *sizes) -> None:
    count = 0
    free = torch.ones_like(_masks(taken))
    for i, words in enumerate(bits):
        mask, area = _masks(words), int(areas[i])
        visible = int((mask & free).sum()) * bool(valid[i])
        if visible and (area - visible) / area <= float(threshold):
            count += 1
            kept[i] = count
            free &= ~mask


def _ids(bits, windows, kept, labels, ids, class_areas, *sizes) -> None:
    ids.zero_()
    for words, of_instance in zip(bits, kept, strict=True):
        mask = _masks(words)[:, : ids.shape[1]]
        ids[mask & (ids == 0)] = of_instance
    class_areas.copy_(torch.bincount(labels[ids == 0], minlength=len(class_areas)))
