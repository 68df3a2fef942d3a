"""What people would pick instead: other networks, of random weights."""

from collections.abc import Callable

import torch

from .models import Scene, Setting, planted_scores


def torchvision_mask_rcnn(
    setting: Setting, detections: int, device: torch.device
) -> tuple[str, Callable]:
    """Mask R-CNN with ResNet-50: instances alone, their masks at the size of the input."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    height, width = setting.input_size
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=setting.num_things + 1,
        box_detections_per_img=detections,
        min_size=min(height, width),
        max_size=max(height, width),
    )
    for name, value in model.state_dict().items():
        if name.endswith("bn3.weight"):
            value *= 0.1  # see build_both
    model.to(device).eval()
    model.roi_heads.box_predictor.register_forward_hook(
        lambda _, inputs, outputs: (
            planted_scores(outputs[0], detections, background=0),
            outputs[1],
        )
    )
    image = Scene(setting, detections, torch.device("cpu")).image.to(device) / 255
    return f"torchvision Mask R-CNN R50, {detections} detections", lambda: model([image])


def mask2former(setting: Setting, detections: int, device: torch.device) -> tuple[str, Callable]:
    """Mask2Former with Swin-T: the network alone, nothing after it."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig()).to(device).eval()
    image = Scene(setting, detections, torch.device("cpu")).image.to(device)[None] / 255
    return "transformers Mask2Former Swin-T, network alone", lambda: model(pixel_values=image)
