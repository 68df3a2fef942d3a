"""Faster modules with the parameters, and up to rounding the results, of Detectron2's."""

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn import functional as F


def fold_frozen_batch_norm(model: nn.Module) -> None:
    """Make each convolution with a frozen batch normalization a :class:`FoldedConv2d`, in place.

    Names, shapes and values of parameters and buffers stay.
    """
    for module in model.modules():
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = FoldedConv2d
            module.folded = None


class FoldedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` whose frozen batch normalization is part of its weights.

    Saves a pass over the features, in training also what is kept of them for the gradient. The
    folded weights are made anew whenever those they come from have changed.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features to (N, C', H', W')."""
        weight, bias = self._folded_weights()
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _folded_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.norm
        sources = [self.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if self.bias is not None:
            sources.append(self.bias)
        # A tensor's version counts its changes in place, by an optimizer or a checkpoint.
        state = [(t.data_ptr(), t._version) for t in sources]
        if self.folded is not None and self.folded[0] == state:
            return self.folded[1:]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        # Weights that are part of a graph serve one iteration only.
        self.folded = None if weight.requires_grad else (state, weight, shift)
        return weight, shift
