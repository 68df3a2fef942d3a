"""Detectron2's Panoptic FPN and ours with the same weights, made to find the same scene.

Nothing here was trained. So that everything after the convolutions has as much to do as it has with
a trained network, smooth regions are added to the semantic logits, some proposals are given the
score of an object, and what the ROI heads then find is replaced by objects of a made-up scene.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import panoptic_fpn
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn
from torch.nn import functional as F

from panoptic_fpn_ext import add_panoptic_fpn_config
from panoptic_fpn_ext.modeling import postprocessing

from .dataset import smooth_noise
from .frame import Stages

ZOO_CONFIG = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
DEPTHS = {"R18": 18, "R50": 50, "R101": 101}
MASK_SIDE = 28


@dataclass(frozen=True)
class Setting:
    """Sizes are (height, width); class 0 of the semantic classes is "things", as on COCO."""

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    num_things: int = 80
    num_classes: int = 54

    def __str__(self) -> str:
        sizes = dict.fromkeys("x".join(map(str, s)) for s in (self.input_size, self.output_size))
        return " to ".join(sizes)


SETTINGS = {
    "coco": Setting((800, 1216), (480, 640)),
    "cityscapes": Setting((1024, 2048), (1024, 2048), num_things=8, num_classes=19),
}


def config(setting: Setting, *, depth: int, device: torch.device) -> CfgNode:
    """Detectron2's own, of its model zoo, with our keys, which its model does not read."""
    cfg = model_zoo.get_config(ZOO_CONFIG)
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = setting.num_things
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = setting.num_classes
    cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS = [0]
    area = setting.output_size[0] * setting.output_size[1]
    # No less than Detectron2's unless images are tiny.
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = min(4096, area // 64)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


def build_both(cfg: CfgNode, our_options: Sequence[str]) -> tuple[nn.Module, nn.Module, CfgNode]:
    """
    Args:
        cfg: see :func:`config`.
        our_options: further config keys and their values, for our model.

    Returns:
        Detectron2's model, ours, and our config.
    """
    our_cfg = cfg.clone()
    our_cfg.MODEL.META_ARCHITECTURE = "PanopticFPNExt"
    our_cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticFPNHead"
    our_cfg.merge_from_list(list(our_options))
    torch.manual_seed(0)
    detectron2, ours = build_model(cfg), build_model(our_cfg)
    state = detectron2.state_dict()
    for name, value in state.items():
        if name.endswith("conv3.norm.weight"):
            value *= 0.1  # random residual branches add up to infinity
    ours.load_state_dict(state, strict=True)
    return detectron2, ours, our_cfg


class Scene:
    """A made-up image, and what is to be seen in it."""

    def __init__(
        self, setting: Setting, num_objects: int, device: torch.device, seed: int = 0
    ) -> None:
        """
        Args:
            setting: of the image and its classes.
            num_objects: of sizes from 16 pixels to more than half of the image, overlapping.
            device: of all tensors.
            seed: another makes another scene.
        """
        rng = np.random.default_rng(seed)
        self.setting = setting
        self.num_objects = num_objects
        height, width = setting.input_size
        colors = [smooth_noise(rng, height, width, cells=40) for _ in range(3)]
        image = torch.from_numpy(np.stack(colors)) * 80 + 128
        # Where images come from, the CPU.
        self.image = image.clamp(0, 255).byte()
        # Of the padded image, at the stride of the semantic predictor, 4.
        logits_height, logits_width = (math.ceil(side / 32) * 8 for side in (height, width))
        regions = [
            smooth_noise(rng, logits_height, logits_width, cells=5)
            for _ in range(setting.num_classes)
        ]
        self.regions = 4 * torch.from_numpy(np.stack(regions)).to(device)
        self.boxes, self.masks = (x.to(device) for x in _objects(rng, num_objects, height, width))
        self.classes = torch.from_numpy(rng.integers(setting.num_things, size=num_objects))
        self.classes = self.classes.to(device)
        self.scores = torch.linspace(0.99, 0.05, num_objects, device=device)

    def training_inputs(self) -> list[dict[str, Any]]:
        """The same with ground truth: its objects whole, ``sem_seg`` with an ignored border."""
        size = self.setting.input_size
        instances = Instances(size)
        instances.gt_boxes = Boxes(self.boxes.cpu())
        instances.gt_classes = self.classes.cpu()
        masks = paste_masks_in_image(self.masks[:, 0].cpu(), self.boxes.cpu(), size)
        instances.gt_masks = BitMasks(masks)
        labels = self.regions.argmax(dim=0)[None, None].float().cpu()
        sem_seg = F.interpolate(labels, size=size, mode="nearest")[0, 0].long()
        sem_seg[: max(1, size[0] // 50)] = 255
        return [{"image": self.image, "instances": instances, "sem_seg": sem_seg}]

    def instances(self) -> Instances:
        """Its objects as ROI heads find them; new tensors, since postprocessing scales boxes."""
        return Instances(
            self.setting.input_size,
            pred_boxes=Boxes(self.boxes.clone()),
            scores=self.scores.clone(),
            pred_classes=self.classes.clone(),
            pred_masks=self.masks.clone(),
        )


class Batch:
    """Scenes in a batch, and how a network is made to see them."""

    def __init__(
        self, setting: Setting, num_objects: int, device: torch.device, num_images: int = 1
    ) -> None:
        """
        Args:
            setting, device: see :class:`Scene`.
            num_objects: in each image.
            num_images: each another scene.
        """
        self.setting = setting
        self.num_objects = num_objects
        self.scenes = [Scene(setting, num_objects, device, seed) for seed in range(num_images)]
        self._regions = torch.stack([scene.regions for scene in self.scenes])
        self._logits_scale: float | None = None

    @property
    def inputs(self) -> list[dict[str, Any]]:
        height, width = self.setting.output_size
        return [{"image": s.image, "height": height, "width": width} for s in self.scenes]

    @contextlib.contextmanager
    def shown_to(self, model: nn.Module, stages: Stages) -> Iterator[None]:
        """Within it a Panoptic FPN finds the scenes, and enters stages as it runs.

        "After the network" is all between the semantic predictor and the RPN (Detectron2's head
        upsamples there), and all after the ROI heads.
        """
        model.roi_heads.box_predictor.test_topk_per_image = self.num_objects
        predictor = model.sem_seg_head.predictor

        def enter(stage: str) -> Any:
            return lambda *_: stages.enter(stage)

        def entering(module: ModuleType, function: str, part: str) -> Any:
            call = getattr(module, function)

            def enter_and_call(*args: Any, **kwargs: Any) -> Any:
                stages.enter(part, part_of=AFTER)
                return call(*args, **kwargs)

            return mock.patch.object(module, function, enter_and_call)

        hooks = [
            model.backbone.register_forward_pre_hook(enter("backbone")),
            model.backbone.register_forward_hook(enter("semantic head")),
            predictor.register_forward_hook(self._sem_seg),
            predictor.register_forward_hook(enter(AFTER)),
            predictor.register_forward_hook(lambda *_: stages.enter(UPSAMPLING, part_of=AFTER)),
            # Ours calls the head, then the rest; Detectron2's makes anchors first.
            model.proposal_generator.rpn_head.register_forward_pre_hook(enter("RPN")),
            model.proposal_generator.anchor_generator.register_forward_pre_hook(enter("RPN")),
            model.roi_heads.register_forward_pre_hook(enter("ROI heads")),
            model.roi_heads.box_predictor.register_forward_hook(self._scores),
            model.roi_heads.register_forward_hook(self._instances),
            model.roi_heads.register_forward_hook(enter(AFTER)),
        ]
        try:
            with contextlib.ExitStack() as patches:
                for module, function, part in PARTS:
                    patches.enter_context(entering(module, function, part))
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _sem_seg(self, predictor: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        """The regions, and a little of what the network says, so that it counts."""
        if self._logits_scale is None:
            self._logits_scale = 0.1 / max(float(logits.float().std()), 1e-6)
        return logits.mul_(self._logits_scale).add_(self._regions)

    def _scores(self, predictor: nn.Module, inputs: Any, outputs: Any) -> Any:
        logits, deltas = outputs
        number = self.num_objects * len(self.scenes)
        return planted_scores(logits, number, background=-1), deltas

    def _instances(self, roi_heads: nn.Module, inputs: Any, outputs: Any) -> Any:
        return [scene.instances() for scene in self.scenes], {}


PREPROCESS, AFTER = "preprocess", "after the network"
NETWORK = (PREPROCESS, "backbone", "semantic head", "RPN", "ROI heads")
UPSAMPLING, MERGING = "semantic upsampling", "pasting and merging"
PARTS = (
    (panoptic_fpn, "sem_seg_postprocess", UPSAMPLING),
    (panoptic_fpn, "detector_postprocess", MERGING),
    (postprocessing, "upsampled", UPSAMPLING),
    (postprocessing, "upsampled_labels", UPSAMPLING),
    (postprocessing, "_rescaled", MERGING),
)
"""Functions of Detectron2's model and of ours with which a part of "after the network" begins. The
class of each pixel is found while upsampling in ours, before merging in Detectron2's."""


def planted_scores(logits: torch.Tensor, num_objects: int, *, background: int) -> torch.Tensor:
    """Logits (proposals, classes) by which three times ``num_objects`` proposals are objects."""
    num_proposals, num_classes = logits.shape
    planted = torch.zeros_like(logits)
    planted[:, background] = 10
    number = min(num_proposals, 3 * num_objects)
    chosen = torch.arange(number, device=logits.device) * num_proposals // max(number, 1)
    foreground = torch.arange(num_classes, device=logits.device)
    foreground = foreground[foreground != background % num_classes]
    classes = foreground[torch.arange(number, device=logits.device) % len(foreground)]
    planted[chosen, classes] = torch.linspace(14, 10, number).to(planted)
    return planted


def _objects(
    rng: np.random.Generator, number: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (N, 4) in an image and masks (N, 1, M, M) of probabilities over each."""
    side = min(height, width)
    scale = np.exp(rng.uniform(np.log(min(16, side / 4)), np.log(0.6 * side), number))
    aspect = np.exp(rng.uniform(-0.7, 0.7, number))
    w, h = np.minimum(scale * aspect, width - 1), np.minimum(scale / aspect, height - 1)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    boxes = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)).float()
    rows, columns = np.mgrid[-1 : 1 : MASK_SIDE * 1j, -1 : 1 : MASK_SIDE * 1j]
    masks = np.empty((number, 1, MASK_SIDE, MASK_SIDE), np.float32)
    for mask in masks:
        ragged = smooth_noise(rng, MASK_SIDE, MASK_SIDE, cells=6)
        mask[0] = 1 / (1 + np.exp(8 * (np.hypot(rows, columns) - 0.85 + 0.2 * ragged)))
    return boxes, torch.from_numpy(masks)


def agreement(
    ours: Sequence[Mapping[str, Any]], detectron2: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """How far the outputs of both agree, those that ours has, in the image where least.

    Returns:
        ``labels_equal``, the share of pixels of ``panoptic_seg`` that belong to the same segment in
        both; ``segments_equal``, 0 or 1; ``score_difference``, the greatest. Where they are there:
        ``sem_seg_difference``, the greatest over the range of the logits, and
        ``instance_masks_equal``, the share of pixels.
    """
    images = [_agreement(*outputs) for outputs in zip(ours, detectron2, strict=True)]
    return {
        name: (max if name.endswith("difference") else min)(found[name] for found in images)
        for name in images[0]
    }


def _agreement(ours: Mapping[str, Any], detectron2: Mapping[str, Any]) -> dict[str, float]:
    """See :func:`agreement`, of one image."""
    panoptic = [outputs["panoptic_seg"] for outputs in (ours, detectron2)]
    keys = [[_key(s) for s in segments] for _, segments in panoptic]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys[0] + keys[1]), 1)}
    labels = []
    for (ids, _), segment_keys in zip(panoptic, keys, strict=True):
        table = ids.new_tensor([0, *(numbers[key] for key in segment_keys)])
        labels.append(table[ids.long()])
    scores = [{_key(s): s["score"] for s in segments if s["isthing"]} for _, segments in panoptic]
    found = {
        "labels_equal": (labels[0] == labels[1]).double().mean().item(),
        "segments_equal": float(keys[0] == keys[1] and bool(keys[0])),
        "score_difference": max(
            (abs(scores[0][k] - scores[1][k]) for k in scores[0].keys() & scores[1].keys()),
            default=0.0,
        ),
    }
    if "sem_seg" in ours:
        ours_logits, logits = ours["sem_seg"].float(), detectron2["sem_seg"].float()
        spread = logits.max() - logits.min()
        found["sem_seg_difference"] = ((ours_logits - logits).abs().max() / spread).item()
    if "instances" in ours:
        masks = ours["instances"].pred_masks, detectron2["instances"].pred_masks
        same_shape = masks[0].shape == masks[1].shape
        found["instance_masks_equal"] = (
            (masks[0] == masks[1]).double().mean().item() if same_shape else 0.0
        )
    return found


def _key(segment: Mapping[str, Any]) -> tuple:
    """What a segment is, whatever its id."""
    return segment["isthing"], segment["category_id"], segment.get("instance_id")


def agrees(found: Mapping[str, float], *, exact: bool) -> bool:
    """Whether outputs count as the same.

    Args:
        found: from :func:`agreement`.
        exact: whether both were computed in float32. If not, 1 % of the labels may differ, and
            with them which stuff is large enough for a segment.
    """
    share, tolerance = (0.9999, 1e-4) if exact else (0.99, 2e-2)
    return (
        min(found["labels_equal"], found.get("instance_masks_equal", 1)) >= share
        and (found["segments_equal"] == 1 or not exact)
        and max(found["score_difference"], found.get("sem_seg_difference", 0)) <= tolerance
    )
