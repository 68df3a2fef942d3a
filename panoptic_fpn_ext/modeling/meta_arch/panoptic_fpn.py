"""Panoptic FPN: one network for instance, semantic and panoptic segmentation."""

import contextlib
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
    build_sem_seg_head,
)
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import nn

from ...config import resolve_dataset_keys
from ...errors import UserError
from ..acceleration import accelerate, is_planar_faster
from ..postprocessing import PanopticPostprocessor
from ..semantic_head import logits_for_postprocessing

TASKS = ("instance", "semantic")
TRAINING = ("joint", "alternate")
PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@META_ARCH_REGISTRY.register()
class PanopticFPNExt(GeneralizedRCNN):
    """Panoptic FPN (paper, section 3), a drop-in for Detectron2's ``PanopticFPN``.

    Inputs, outputs, losses and parameter names are those of the built-in model.
    """

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        postprocess: PanopticPostprocessor | None = None,
        instance_loss_weight: float = 1.0,
        training_schedule: str = "joint",
        feature_groups: int = 1,
        channels_last: bool = False,
        fold_batch_norm: bool = False,
        winograd: bool = False,
        inference_precision: str = "float32",
        **rcnn_args: Any,
    ) -> None:
        """
        Args:
            sem_seg_head: the semantic branch; its ``loss_weight`` is λs.
            postprocess: makes the outputs of an image; by default all of them.
            instance_loss_weight: λi, on the losses of the ROI heads. Where λi or λs is 0, the
                branch is neither run in training nor trained.
            training_schedule: ``"joint"``, or ``"alternate"`` for the instance task in even
                iterations and the semantic task in odd ones (paper, section 4.2).
            feature_groups: groups of the channels of the backbone's outputs; the instance branch
                reads the first, the semantic branch the last.
            channels_last: whether features have the channels of a pixel side by side in memory,
                where that is faster: on GPUs, and on CPUs in inference without ``winograd``.
            fold_batch_norm, winograd: see :func:`accelerate`.
            inference_precision: ``"float32"``, or ``"float16"`` or ``"bfloat16"`` for what autocast
                has in that precision.
            rcnn_args: those of :class:`GeneralizedRCNN`.
        """
        super().__init__(**rcnn_args)
        if training_schedule not in TRAINING:
            raise UserError(
                f"MODEL.PANOPTIC_FPN.TRAINING {training_schedule!r}: allowed are {list(TRAINING)}"
            )
        if inference_precision not in PRECISIONS:
            raise UserError(
                f"MODEL.INFERENCE_PRECISION {inference_precision!r}: allowed are {[*PRECISIONS]}"
            )
        self.sem_seg_head = sem_seg_head
        self.postprocess = postprocess or PanopticPostprocessor()
        self.instance_loss_weight = instance_loss_weight
        self.training_schedule = training_schedule
        self.feature_groups = feature_groups
        self.channels_last = channels_last
        self.winograd = winograd
        self.inference_precision = inference_precision
        accelerate(self, fold_batch_norm=fold_batch_norm, winograd=winograd)
        branches = {
            "instance": (instance_loss_weight, [self.proposal_generator, self.roi_heads]),
            "semantic": (getattr(sem_seg_head, "loss_weight", 1.0), [sem_seg_head]),
        }
        self.tasks = tuple(task for task, (weight, _) in branches.items() if weight)
        if not self.tasks:
            raise UserError(
                "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT and MODEL.SEM_SEG_HEAD.LOSS_WEIGHT are "
                "both 0: nothing is left to train"
            )
        for weight, modules in branches.values():
            if not weight:
                nn.ModuleList(modules).requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        cfg = resolve_dataset_keys(cfg)
        if "panoptic_seg" in cfg.MODEL.PANOPTIC_FPN.OUTPUTS and not cfg.MODEL.MASK_ON:
            raise UserError(
                "MODEL.MASK_ON is False, but panoptic_seg, one of MODEL.PANOPTIC_FPN.OUTPUTS, is "
                "merged from masks: set it to True, or leave out panoptic_seg"
            )
        backbone = build_backbone(cfg)
        groups = cfg.MODEL.FPN.GROUPS
        shapes = {
            name: ShapeSpec(channels=shape.channels // groups, stride=shape.stride)
            for name, shape in backbone.output_shape().items()
        }
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
            "sem_seg_head": build_sem_seg_head(cfg, shapes),
            "fold_batch_norm": cfg.MODEL.FOLD_BN,
            "winograd": cfg.MODEL.WINOGRAD,
            "inference_precision": cfg.MODEL.INFERENCE_PRECISION,
            "channels_last": cfg.MODEL.CHANNELS_LAST,
            "postprocess": PanopticPostprocessor(cfg),
            "instance_loss_weight": cfg.MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT,
            "training_schedule": cfg.MODEL.PANOPTIC_FPN.TRAINING,
            "feature_groups": groups,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """
        Args:
            batched_inputs: a dict for each image, as :class:`PanopticFPNMapper` makes them:
                ``image`` (C, H, W); in training ``instances`` and ``sem_seg`` (H, W); in inference
                optionally ``height`` and ``width`` of the outputs.

        Returns:
            In training the losses of this iteration's tasks, weighted; in inference a dict for
            each image, see :class:`PanopticPostprocessor`.
        """
        if not self.training:
            dtype = PRECISIONS[self.inference_precision]
            with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
                return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self._features(images)
        tasks = self._tasks_of_iteration()
        losses = {}
        if "semantic" in tasks:
            sem_seg = self._pad([x["sem_seg"].to(self.device) for x in batched_inputs])
            losses.update(self.sem_seg_head(self._features_for("semantic", features), sem_seg)[1])
        if "instance" in tasks:
            features = self._features_for("instance", features)
            instances = [x["instances"].to(self.device) for x in batched_inputs]
            proposals, proposal_losses = self.proposal_generator(images, features, instances)
            _, roi_losses = self.roi_heads(images, _planar(features), proposals, instances)
            losses.update(proposal_losses)
            losses.update({k: v * self.instance_loss_weight for k, v in roi_losses.items()})
        return losses

    def inference(
        self, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True
    ) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: see :meth:`forward`.
            do_postprocess: whether to bring the outputs to the size of the original images and
                merge them.

        Returns:
            See :meth:`forward`; without postprocessing, as the built-in model, the raw instances
            (a list) and semantic logits (N, num_classes, H, W).
        """
        images = self.preprocess_image(batched_inputs)
        features = self._features(images)
        sem_seg = instances = [None] * len(batched_inputs)
        stride = 1
        if self.postprocess.needs("sem_seg") or not do_postprocess:
            semantic_features = self._features_for("semantic", features)
            if do_postprocess:
                sem_seg, stride = logits_for_postprocessing(self.sem_seg_head, semantic_features)
            else:
                sem_seg, _ = self.sem_seg_head(semantic_features, None)
        if self.postprocess.needs("instances") or not do_postprocess:
            features = self._features_for("instance", features)
            proposals, _ = self.proposal_generator(images, features, None)
            instances, _ = self.roi_heads(images, _planar(features), proposals, None)
        if not do_postprocess:
            return instances, sem_seg
        return [
            self.postprocess(*args, stride=stride)
            for args in zip(sem_seg, instances, images.image_sizes, batched_inputs, strict=True)
        ]

    def _features(self, images: ImageList) -> dict[str, torch.Tensor]:
        pixels = images.tensor
        planar = self.winograd and is_planar_faster(pixels)
        if self.channels_last and not planar and (pixels.is_cuda or not self.training):
            # Convolutions keep the layout of their input.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.backbone(pixels)

    def _tasks_of_iteration(self) -> tuple[str, ...]:
        if self.training_schedule == "joint":
            return self.tasks
        # The storage's iteration is the trainer's: a resumed run goes on in the right phase.
        return (self.tasks[get_event_storage().iter % len(self.tasks)],)

    def _features_for(
        self, task: str, features: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The channels of a task's group."""
        if self.feature_groups == 1:
            return features
        group = 0 if task == "instance" else -1
        return {k: v.chunk(self.feature_groups, dim=1)[group] for k, v in features.items()}

    def _pad(self, sem_seg: list[torch.Tensor]) -> torch.Tensor:
        """Semantic maps as one batch, padded as :meth:`preprocess_image` pads the images."""
        args = [self.backbone.size_divisibility, self.sem_seg_head.ignore_value]
        if hasattr(self.backbone, "padding_constraints"):  # newer than Detectron2 v0.6
            args.append(self.backbone.padding_constraints)
        return ImageList.from_tensors(sem_seg, *args).tensor


def _planar(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features with each channel in one piece, as RoIAlign wants them; it would copy them anew for
    every head and cascade stage."""
    return {name: feature.contiguous() for name, feature in features.items()}
