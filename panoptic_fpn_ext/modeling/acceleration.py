"""Faster modules with the parameters, and up to rounding the results, of Detectron2's."""

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, ROIAlign
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

# From where on each way of convolving beats oneDNN's (measured on x86-64).
WINOGRAD_MIN_CHANNELS = 64
WINOGRAD_MIN_PIXELS = 2048
WINOGRAD_MIN_BATCH = 32
MATMUL_MIN_PIXELS = 2048
ROI_ALIGN_MIN_WORK = 2**19  # values; from there on threads are worth their start

# What bounds memory: so many pixels at once for NNPACK, which keeps its workspace, and of what has
# more, strips of so many; so many masks.
WINOGRAD_MAX_PIXELS = 2**16
WINOGRAD_STRIP_PIXELS = 2**14
MAX_MASKS = 32


def accelerate(model: nn.Module, *, fold_batch_norm: bool, winograd: bool) -> None:
    """Make convolutions, RoIAlign and Detectron2's mask and RPN heads faster or leaner, in place.

    Names, shapes and values of parameters and buffers stay.

    Args:
        model: where to look for them.
        fold_batch_norm: see :class:`FastConv2d`.
        winograd: see :class:`FastConv2d`.
    """
    for module in model.modules():
        if type(module) in (nn.Conv2d, Conv2d) and module.padding_mode == "zeros":
            if type(module) is nn.Conv2d:
                module.norm = module.activation = None
            module.__class__ = FastConv2d
            module.folds = fold_batch_norm and _is_foldable(module.norm)
            module.folded = None
            module.winograd = winograd
        elif type(module) is MaskRCNNConvUpsampleHead:
            module.__class__ = LeanMaskHead
        elif type(module) is StandardRPNHead:
            module.__class__ = LeanRPNHead
        elif type(module) is ROIAlign:
            module.__class__ = ParallelROIAlign


def _is_foldable(norm: nn.Module | None) -> bool:
    """Whether a normalization is, out of training, the same linear map for every image."""
    known = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return type(norm) in known and norm.weight is not None and norm.running_var is not None


class FastConv2d(Conv2d):
    """Detectron2's ``Conv2d``, sparing passes over the features and multiplications.

    - A batch normalization, in training only a frozen one, becomes part of the weights. That saves
      a pass over the features, in training also what is kept of them for the gradient. The folded
      weights are made anew whenever those they come from have changed.
    - On CPUs in float32, see :func:`convolve`.
    """

    folds: bool
    winograd: bool
    folded: tuple | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features to (N, C', H', W')."""
        weight, bias, norm = self.weight, self.bias, self.norm
        if self.folds and self._is_norm_fixed():
            weight, bias = self._folded_weights()
            norm = None
        convolution = (self.stride, self.padding, self.dilation, self.groups)
        convolve_ = convolve if self.winograd else F.conv2d
        x = convolve_(x, weight, bias, *convolution)
        if norm is not None:
            x = norm(x)
        if self.activation is None:
            return x
        is_relu = self.activation in (F.relu, torch.relu) or isinstance(self.activation, nn.ReLU)
        return x.relu_() if is_relu and not x.requires_grad else self.activation(x)

    def _is_norm_fixed(self) -> bool:
        # A compiler fuses the normalization itself, and cannot look at the versions of tensors.
        is_frozen = isinstance(self.norm, FrozenBatchNorm2d) or not self.norm.training
        return is_frozen and not torch.compiler.is_compiling()

    def _folded_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.norm
        sources = [self.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if self.bias is not None:
            sources.append(self.bias)
        if not isinstance(norm, FrozenBatchNorm2d):
            sources.append(norm.num_batches_tracked)
        # A tensor's version counts its changes in place, by an optimizer or a checkpoint. Training
        # changes running statistics without, but counts its batches.
        state = [(t.data_ptr(), t._version) for t in sources]
        if self.folded is not None and self.folded[0] == state:
            return self.folded[1:]
        # Not fuse_conv_bn_weights of torch.nn.utils: it makes new parameters, cutting the gradient.
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        # Weights that are part of a graph serve one iteration only.
        self.folded = None if weight.requires_grad else (state, weight, shift)
        return weight, shift


class LeanMaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's, which in inference has the features of some instances at once in memory."""

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features to (N, num_classes, 2H, 2W) logits."""
        if self.training:
            return super().layers(x)
        return torch.cat([super(LeanMaskHead, self).layers(some) for some in x.split(MAX_MASKS)])


class LeanRPNHead(StandardRPNHead):
    """Detectron2's, which in inference on CPUs has the hidden features of a large level in memory
    some rows at a time."""

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Objectness logits and anchor deltas of each level."""
        predictions = [self._predictions(feature) for feature in features]
        return [objectness for objectness, _ in predictions], [deltas for _, deltas in predictions]

    def _predictions(self, feature: torch.Tensor) -> Sequence[torch.Tensor]:
        height, width = feature.shape[-2:]
        is_small = height * width <= WINOGRAD_MAX_PIXELS
        if is_small or torch.is_grad_enabled() or not is_planar_faster(feature):
            return [predictions[0] for predictions in super().forward([feature])]
        rows = max(1, WINOGRAD_STRIP_PIXELS // width)
        margin = sum(isinstance(module, nn.Conv2d) for module in self.conv.modules())
        strips = []
        for start in range(0, height, rows):
            stop, first = start + rows, max(start - margin, 0)
            predictions = super().forward([feature[:, :, first : stop + margin]])
            strips.append([p[0][:, :, start - first : stop - first] for p in predictions])
        return [torch.cat(parts, dim=2) for parts in zip(*strips, strict=True)]


class ParallelROIAlign(ROIAlign):
    """Detectron2's, which on CPUs computes with one thread, with all of them in inference."""

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features and (K, 5) boxes, after the index of each's image, to
        (K, C, *output_size)."""
        number = torch.get_num_threads()
        work = len(rois) * input.shape[1] * math.prod(_pair(self.output_size))
        if torch.is_grad_enabled() or not _is_plain(input) or work < ROI_ALIGN_MIN_WORK:
            return super().forward(input, rois)
        plain = super().forward

        @torch.no_grad()  # threads have a mode of their own
        def some(rois: torch.Tensor) -> torch.Tensor:
            return plain(input, rois)

        with ThreadPoolExecutor(number) as threads:
            return torch.cat([*threads.map(some, rois.chunk(number))])


def is_planar_faster(x: torch.Tensor) -> bool:
    """Whether :func:`convolve` has ways of its own for features like ``x``: it wants each channel
    in one piece."""
    return _is_plain(x) and torch.backends.nnpack.is_available()


def _is_plain(x: torch.Tensor) -> bool:
    """Whether what is done to ``x`` happens now, on a CPU, in float32."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """:func:`F.conv2d`, with fewer multiplications where that is faster.

    On CPUs in float32, large 3x3 convolutions of stride 1 take Winograd's algorithm (Lavin and
    Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016) as NNPACK has it, which
    comes with PyTorch: F(6x6, 3x3), 5 times fewer multiplications. Large 1x1 convolutions
    are matrix products.
    """
    plain = functools.partial(F.conv2d, x, weight, bias, stride, padding, dilation, groups)
    if dilation != (1, 1) or groups != 1 or not is_planar_faster(x):
        return plain()
    pixels = math.ceil(x.shape[-2] / stride[0]) * math.ceil(x.shape[-1] / stride[1])
    if weight.shape[-2:] == (1, 1) and padding == (0, 0) and pixels >= MATMUL_MIN_PIXELS:
        x = x[:, :, :: stride[0], :: stride[1]]
        matrices = weight.flatten(1).expand(len(x), -1, -1), x.flatten(2)
        product = torch.bmm(*matrices) if bias is None else torch.baddbmm(bias[:, None], *matrices)
        return product.unflatten(2, x.shape[-2:])
    if (
        weight.shape[-2:] == (3, 3)
        and padding == stride == (1, 1)
        and min(weight.shape[:2]) >= WINOGRAD_MIN_CHANNELS
        and (pixels >= WINOGRAD_MIN_PIXELS or len(x) >= WINOGRAD_MIN_BATCH)
    ):
        return _Winograd.apply(x, weight, bias)
    return plain()


class _Winograd(torch.autograd.Function):
    """3x3 convolution of stride 1 and padding 1."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _winograd(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _winograd(gradient, weight.flip(2, 3).transpose(0, 1), None)
        wanted = (False, ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
        _, *gradients = torch.ops.aten.convolution_backward(
            gradient, x, weight, weight.shape[:1], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted
        )
        return x_gradient, *gradients


def _winograd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """NNPACK's, in pieces that bound its workspace."""
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
