"""Convolutions with fewer passes over the features and fewer multiplications."""

import contextlib
import math
import platform
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn import functional as F

from .stand_in import StandIn, is_eager, is_eager_on_cpu

# From where on each way of convolving beats oneDNN's (measured on x86-64).
WINOGRAD_MIN_CHANNELS = 64
WINOGRAD_MIN_PIXELS = 2048
WINOGRAD_MIN_BATCH = 32
MATMUL_MIN_PIXELS = 2048

# Features whose greatest magnitude is at most so many times their mean keep Winograd's error within
# 2e-3 of the mean magnitude of the outputs, which is about TF32's (docs/ACCELERATION.md).
WINOGRAD_MAX_SPREAD = 100
WINOGRAD_MAX_MAGNITUDE = 1e30

# What bounds NNPACK's workspace: so many pixels at once, and of larger images strips of so many.
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

    With ``channels_last``, what convolves images brings them to the layout in which the channels of
    a pixel are side by side in memory, where that is faster: on GPUs but in full float32, and on
    CPUs in inference where Winograd's algorithm is not taken. The other convolutions keep the
    layout of their input.
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
        if brings and not self._is_planar(x):
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

    def _is_planar(self, x: torch.Tensor) -> bool:
        """Whether images stay as they are, each channel in one piece."""
        if x.is_cuda:  # tensor cores want the channels side by side; cuDNN in full float32 does not
            in_full = x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
            return in_full and not torch.backends.cudnn.allow_tf32
        return torch.is_grad_enabled() or (self.winograd and has_winograd(x))


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
    """Whether :func:`convolve` may take Winograd's algorithm for ``x``, which wants each channel in
    one piece: in inference on x86-64 CPUs, where PyTorch has NNPACK."""
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
    """:func:`F.conv2d`, on CPUs in float32 in a faster way where there is one.

    With ``winograd``, large 3x3 convolutions of stride 1 take Winograd's algorithm in inference
    (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016) as NNPACK has it,
    which comes with PyTorch: F(6x6, 3x3), 5 times fewer multiplications. It spreads the rounding
    error of large values over their neighbours, so features with outliers and values that are not
    finite are convolved directly. Large 1x1 convolutions are matrix products.
    """
    is_plain = dilation == (1, 1) and groups == 1 and x.dim() == 4 and x.numel()
    if winograd and is_plain and is_eager_on_cpu(x, weight):
        kernel = tuple(weight.shape[-2:])
        pixels = math.ceil(x.shape[-2] / stride[0]) * math.ceil(x.shape[-1] / stride[1])
        if kernel == (1, 1) and padding == (0, 0) and pixels >= MATMUL_MIN_PIXELS:
            return _matrix_product(x[:, :, :: stride[0], :: stride[1]], weight.flatten(1), bias)
        if (
            kernel == (3, 3)
            and padding == stride == (1, 1)
            and min(weight.shape[:2]) >= WINOGRAD_MIN_CHANNELS
            and (pixels >= WINOGRAD_MIN_PIXELS or len(x) >= WINOGRAD_MIN_BATCH)
            and has_winograd(x)
            and _is_exact_enough(x, weight)
        ):
            return _winograd(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _matrix_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Features (N, C, H, W) times weights (C', C): (N, C', H, W)."""
    matrices = weight.expand(len(x), -1, -1), x.flatten(2)
    product = torch.bmm(*matrices) if bias is None else torch.baddbmm(bias[:, None], *matrices)
    return product.unflatten(2, x.shape[-2:])


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
    if height * width < WINOGRAD_MIN_PIXELS:
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
