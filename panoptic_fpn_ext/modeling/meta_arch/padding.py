"""Tensors of several images as one batch."""

from collections.abc import Sequence

import torch
from detectron2.modeling import Backbone
from detectron2.structures import ImageList


def padded(tensors: Sequence[torch.Tensor], backbone: Backbone, value: float = 0.0) -> ImageList:
    """A batch of images or maps (..., H, W), padded as Detectron2 pads the images of a backbone."""
    arguments = [backbone.size_divisibility, value]
    if hasattr(backbone, "padding_constraints"):  # newer than Detectron2 v0.6
        arguments.append(backbone.padding_constraints)
    return ImageList.from_tensors(list(tensors), *arguments)
