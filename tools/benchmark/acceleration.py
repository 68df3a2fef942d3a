"""Models of Detectron2's zoo, as they are and after :func:`panoptic_fpn_ext.accelerate`."""

import argparse
import copy
import functools
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from torch import nn

from panoptic_fpn_ext import accelerate

from .frame import Stages, by_turns
from .models import SETTINGS, Scene
from .results import Comparison, Peer, Times

ZOO_CONFIGS = {
    "Mask R-CNN R50": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Cascade Mask R-CNN R50": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "RetinaNet R50": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "Panoptic FPN R50": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
}
CHOICES = {
    "all": {},
    "WINOGRAD alone": {"fold_batch_norm": False, "channels_last": False},
    "FOLD_BN alone": {"winograd": False, "channels_last": False},
    "CHANNELS_LAST alone": {"winograd": False, "fold_batch_norm": False},
}


def acceleration(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """A row for each model; for the first of them one for each setting of its own, too."""
    rows = []
    for setting in args.sizes or [SETTINGS["coco"]]:
        image = Scene(setting, 30, args.device).image
        for place, (name, config_file) in enumerate(ZOO_CONFIGS.items()):
            plain = build(config_file, args.device)
            for choice, settings in CHOICES.items() if place == 0 else [("all", {})]:
                accelerated = accelerate(copy.deepcopy(plain), **settings)
                rows.append(compare(f"{name}, {choice}", plain, accelerated, image, args))
    return rows, []


def build(config_file: str, device: torch.device) -> nn.Module:
    """With random weights, of which nothing grows to infinity."""
    cfg = model_zoo.get_config(config_file)
    cfg.MODEL.DEVICE = str(device)
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, value in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value *= 0.1
    return model.eval()


def compare(
    what: str, plain: nn.Module, accelerated: nn.Module, image: torch.Tensor, args: Any
) -> Comparison:
    stages = Stages(args.device)

    @torch.no_grad()
    def predict(model: nn.Module) -> Any:
        return stages.time(functools.partial(model, [{"image": image}]))

    runs = [functools.partial(predict, model) for model in (accelerated, plain)]
    first, turns = by_turns(runs, args.rounds)
    ours, theirs = (outputs[0]["instances"] for (outputs, _) in first)
    number = min(len(ours), len(theirs))
    difference = (ours.scores[:number] - theirs.scores[:number]).abs().max() if number else 0.0
    same = len(ours) == len(theirs) and float(difference) <= 1e-4
    our_ms, plain_ms = (Times.of([seconds[""] for _, seconds in turn]) for turn in turns)
    return Comparison(
        what=what,
        size="x".join(map(str, image.shape[1:])),
        ours_ms=our_ms,
        detectron2_ms=plain_ms,
        same_answer=same,
        agreement={"scores_difference": float(difference)},
    )
