"""Convolutions with fewer passes over the features and fewer multiplications."""

import contextlib
import functools
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn import functional as F

from .fastest import fastest, magnitude
from .stand_in import StandIn, is_eager, is_eager_on_cpu

# Convolutions of fewer multiply-adds take less than a millisecond: not worth measuring. Ways are
# measured on no more pixels of an image, and no more images, than these.
WORTH_MEASURING = 2**24
SAMPLE_PIXELS = 2**15
SAMPLE_IMAGES = 32

# Features whose greatest magnitude is at most so many times their mean keep Winograd's error within
# 2e-3 of the mean magnitude of the outputs, which is about TF32's (docs/ACCELERATION.md).
WINOGRAD_MAX_SPREAD = 100
WINOGRAD_MAX_MAGNITUDE = 1e30

# What bounds NNPACK's workspace: so many pixels at once, of images below the first several; and of
# larger images strips of so many.
WINOGRAD_SMALL_PIXELS = 2**11
WINOGRAD_MAX_PIXELS = 2**16
WINOGRAD_STRIP_PIXELS = 2**14

IMAGE_CHANNELS = 3
FOLDABLE = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class FastConv2d(StandIn, nn.Conv2d):
    """``nn.Conv2d`` that convolves by :func:`convolve`."""

    winograd: bool

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.padding_mode != "zeros":
                return super()._conv_forward(input, weight, bias)
            geometry = self.stride, self.padding, self.dilation, self.groups
            return convolve(input, weight, bias, *geometry, winograd=self.winograd)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class FastConvNorm2d(StandIn, Conv2d):
    """Detectron2's ``Conv2d`` that convolves by :func:`convolve`, with its normalization folded in.

    With ``fold_batch_norm`` a batch normalization, in training only a frozen one, becomes part of
    the weights. That saves a pass over the features, and in training what is kept of them for the
    gradient. Weights are folded anew in each forward, which costs less than 1 % of it: there is
    nothing to go stale.

    With ``channels_last``, what convolves images on GPUs, but in full float32, brings them to the
    layout in which the channels of a pixel are side by side in memory. The other convolutions keep
    the layout of their input.
    """

    winograd: bool
    fold_batch_norm: bool
    channels_last: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features to (N, C', H', W')."""
        if not torch.jit.is_scripting():
            if self.padding_mode != "zeros" or not is_eager(x, self.weight):
                return super().forward(x)
            return self._accelerated(x)
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    @torch.jit.unused
    def _accelerated(self, x: torch.Tensor) -> torch.Tensor:
        brings = self.channels_last and self.in_channels == IMAGE_CHANNELS
        if brings and _is_for_tensor_cores(x):
            x = x.contiguous(memory_format=torch.channels_last)
        weight, bias, norm = self.weight, self.bias, self.norm
        if self.fold_batch_norm and _is_foldable(norm):
            weight, bias = _folded(weight, bias, *vars(self).get("_affine") or _affine(norm))
            norm = None
        geometry = self.stride, self.padding, self.dilation, self.groups
        x = convolve(x, weight, bias, *geometry, winograd=self.winograd)
        if norm is not None:
            x = norm(x)
        if self.activation is None:
            return x
        is_relu = self.activation in (F.relu, torch.relu) or isinstance(self.activation, nn.ReLU)
        return x.relu_() if is_relu and not x.requires_grad else self.activation(x)


def _is_for_tensor_cores(x: torch.Tensor) -> bool:
    """Whether images are convolved by what wants the channels side by side; on GPUs in full float32
    cuDNN does not."""
    if not x.is_cuda:
        return False
    in_full = x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    return not in_full or torch.backends.cudnn.allow_tf32


def _is_foldable(norm: nn.Module | None) -> bool:
    """Whether a normalization is now the same linear map for every image, and nobody watches it."""
    return (
        type(norm) in FOLDABLE
        and (isinstance(norm, FrozenBatchNorm2d) or not norm.training)
        and norm.weight is not None
        and norm.running_var is not None
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
    )


def _affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the shift (C,) that a normalization is."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


@contextlib.contextmanager
def normalizations_at_once(module: nn.Module) -> Iterator[None]:
    """Within it the convolutions below ``module`` have the scales and shifts of their
    normalizations, all found together; a GPU has less to launch."""
    convolutions = [
        m
        for m in module.modules()
        if isinstance(m, FastConvNorm2d) and m.fold_batch_norm and _is_foldable(m.norm)
    ]
    # With another epsilon or dtype each finds its own.
    kinds = Counter((m.norm.eps, m.norm.weight.dtype) for m in convolutions)
    kind, _ = kinds.most_common(1)[0] if kinds else (None, 0)
    alike = [m for m in convolutions if (m.norm.eps, m.norm.weight.dtype) == kind]
    if alike:
        names = ("weight", "bias", "running_mean", "running_var")
        together = SimpleNamespace(
            eps=alike[0].norm.eps,
            **{n: torch.cat([getattr(m.norm, n) for m in alike]) for n in names},
        )
        sizes = [m.out_channels for m in alike]
        parts = (x.split(sizes) for x in _affine(together))
        for m, affine in zip(alike, zip(*parts, strict=True), strict=True):
            vars(m)["_affine"] = affine
    try:
        yield
    finally:
        for m in alike:
            vars(m).pop("_affine", None)


def _folded(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (C', C, h, w) and bias (C',) of a convolution with the normalization after it."""
    # Not fuse_conv_bn_weights of torch.nn.utils: it makes new parameters, cutting the gradient.
    if bias is not None:
        shift = shift + bias * scale
    return weight * scale[:, None, None, None], shift


def has_winograd(x: torch.Tensor) -> bool:
    """Whether :func:`convolve` may take Winograd's algorithm for ``x``: in inference on
    x86-64 CPUs, where PyTorch has NNPACK."""
    return (
        not torch.is_grad_enabled()
        and is_eager_on_cpu(x)
        and platform.machine() in ("x86_64", "AMD64")
        and hasattr(torch, "_nnpack_spatial_convolution")
        and torch.backends.nnpack.is_available()
    )


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    *,
    winograd: bool,
) -> torch.Tensor:
    """:func:`F.conv2d`, on CPUs in float32 in the way that is fastest on this machine.

    With ``winograd``, 3x3 convolutions of stride 1 may take Winograd's algorithm in inference
    (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016) as NNPACK has it,
    which comes with PyTorch: F(6x6, 3x3), 5 times fewer multiplications. It spreads the rounding
    error of large values over their neighbours, so features with outliers and values that are not
    finite are convolved directly. 1x1 convolutions may be matrix products. Which way is faster is
    measured, see :func:`~panoptic_fpn_ext.layers.fastest.fastest`.
    """
    geometry = stride, padding, dilation, groups
    is_plain = dilation == (1, 1) and groups == 1 and x.dim() == 4 and x.numel()
    if winograd and is_plain and is_eager_on_cpu(x, weight):
        pixels = x.shape[0] * x.shape[2] * x.shape[3] / math.prod(stride)
        is_large = pixels * weight.numel() >= WORTH_MEASURING
        way = _other_way(x, weight, stride, padding) if is_large else None
        if way and _is_faster(way, x, weight, bias, geometry):
            return way(x, weight, bias, geometry)
    return _directly(x, weight, bias, geometry)


# The parameters of a convolution: stride, padding, dilation, groups.
Geometry = tuple[tuple[int, int], tuple[int, int] | str, tuple[int, int], int]
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Geometry], torch.Tensor]


def _other_way(
    x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int] | str
) -> Way | None:
    """How to convolve otherwise than directly, if there is a way."""
    kernel = tuple(weight.shape[-2:])
    if kernel == (1, 1) and padding == (0, 0) and x.is_contiguous():
        return _by_matrix_product
    if kernel == (3, 3) and padding == stride == (1, 1) and has_winograd(x):
        return _by_winograd
    return None


def _is_faster(
    way: Way,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> bool:
    """Whether a way is faster than the direct one; with gradients, with them."""
    number, _, height, width = x.shape
    is_planar = x.is_contiguous()
    key = (
        tuple(weight.shape),
        bias is None,
        geometry,
        is_planar,
        torch.is_grad_enabled(),
        magnitude(height * width, SAMPLE_PIXELS),
        magnitude(number, SAMPLE_IMAGES),
    )

    def ways() -> dict[str, Callable[[], object]]:
        rows = max(1, SAMPLE_PIXELS // width) * geometry[0][0]
        layout = torch.contiguous_format if is_planar else torch.channels_last
        sample = x[:SAMPLE_IMAGES, :, :rows].detach().clone(memory_format=layout)
        tensors = [sample, weight.detach().clone()]
        if torch.is_grad_enabled():
            tensors = [tensor.requires_grad_() for tensor in tensors]
        fixed_bias = None if bias is None else bias.detach()

        def run(convolve: Way) -> None:
            output = convolve(*tensors, fixed_bias, geometry)
            if torch.is_grad_enabled():
                torch.autograd.grad(output, tensors, torch.ones_like(output))

        return {
            "direct": functools.partial(run, _directly),
            NAMES[way]: functools.partial(run, way),
        }

    return fastest("convolution", key, ways) == NAMES[way]


def _directly(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    return F.conv2d(x, weight, bias, *geometry)


def _by_matrix_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    rows, columns = geometry[0]
    x = x[:, :, ::rows, ::columns]
    matrices = weight.flatten(1).expand(len(x), -1, -1), x.flatten(2)
    product = torch.bmm(*matrices) if bias is None else torch.baddbmm(bias[:, None], *matrices)
    return product.unflatten(2, x.shape[-2:])


def _by_winograd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    if _is_exact_enough(x, weight):
        return _winograd(x, weight, bias)
    return _directly(x, weight, bias, geometry)


NAMES = {_by_matrix_product: "matrix product", _by_winograd: "Winograd's algorithm"}


def _is_exact_enough(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether features and weights are finite, and the features without outliers.

    Looked at by NumPy, in one thread: PyTorch's would have to be woken, after NNPACK's own.
    """
    features = x.detach().numpy()
    greatest = max(features.max(), -features.min())
    mean = np.abs(features[:, :, ::4]).mean()
    # All false where something is nan.
    return bool(
        greatest <= WINOGRAD_MAX_SPREAD * mean
        and greatest <= WINOGRAD_MAX_MAGNITUDE
        and math.isfinite(weight.detach().numpy().sum())
    )


def _winograd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """NNPACK's 3x3 convolution of stride 1 and padding 1, in pieces that bound its workspace."""
    x, weight = x.contiguous(), weight.contiguous()
    number, _, height, width = x.shape
    if height * width < WINOGRAD_SMALL_PIXELS:
        pieces = x.split(max(1, WINOGRAD_MAX_PIXELS // (height * width)))
        return torch.cat([_nnpack(piece, weight, bias) for piece in pieces])
    if height * width <= WINOGRAD_MAX_PIXELS:
        pieces = [_nnpack(image, weight, bias) for image in x.split(1)]
        return pieces[0] if number == 1 else torch.cat(pieces)
    rows = max(1, WINOGRAD_STRIP_PIXELS // width)
    result = x.new_empty(number, len(weight), height, width)
    for i in range(number):
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first = max(start - 1, 0)
            strip = x[i : i + 1, :, first : stop + 1].contiguous()
            convolved = _nnpack(strip, weight, bias)
            result[i : i + 1, :, start:stop] = convolved[:, :, start - first : stop - first]
    return result


def _nnpack(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch._nnpack_spatial_convolution(x, weight, bias, padding=1, stride=1)
