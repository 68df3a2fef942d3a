"""Panoptic FPN: one network for instance, semantic and panoptic segmentation."""

from collections.abc import Collection, Sequence
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
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ...config import OUTPUTS, resolve_config
from ...errors import UserError
from ..acceleration import Acceleration, on_own_gpu, planar
from ..lean import LeanRPN
from ..postprocessing import PanopticPostprocessor
from ..semantic_head import logits_for_postprocessing
from .ground_truth import ground_truth
from .padding import padded

TASKS = ("instance", "semantic")
OUTPUT_OF = {"instance": "instances", "semantic": "sem_seg"}
TRAINING = ("joint", "alternate")


@META_ARCH_REGISTRY.register()
class PanopticFPNExt(GeneralizedRCNN):
    """Panoptic FPN (paper, section 3), a drop-in for Detectron2's ``PanopticFPN``.

    Inputs, outputs, losses and parameter names are those of the built-in model. Without thing
    classes there is no instance branch, and all segments are stuff.
    """

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
        combine_nms_thresh: float = 1.0,
        thing_sem_seg_ids: Collection[int] = (0,),
        outputs: Sequence[str] = OUTPUTS,
        instance_loss_weight: float = 1.0,
        training_schedule: str = "joint",
        feature_groups: int = 1,
        acceleration: Acceleration | None = None,
        **rcnn_args: Any,
    ) -> None:
        """
        Args:
            sem_seg_head: the semantic branch; its ``loss_weight`` is λs.
            combine_overlap_thresh, combine_stuff_area_thresh, combine_instances_score_thresh:
                those of ``PanopticFPN``, see :func:`merge_panoptic`.
            combine_nms_thresh, thing_sem_seg_ids: see :func:`merge_panoptic`.
            outputs: what inference returns, see :class:`PanopticPostprocessor`.
            instance_loss_weight: λi, on the losses of the ROI heads. Where λi or λs is 0, the
                task is left out of training, with λi the RPN too, which Detectron2 would train.
            training_schedule: ``"joint"``, or ``"alternate"`` for the instance task in even
                iterations and the semantic task in odd ones (paper, section 4.2).
            feature_groups: groups of the channels of the backbone's outputs; the instance branch
                reads the first, the semantic branch the last.
            acceleration: what is done for speed; by default as ``MODEL.ACCELERATION``.
            rcnn_args: those of :class:`GeneralizedRCNN`; ``proposal_generator`` and ``roi_heads``
                are None where there are no thing classes.

        Raises:
            UserError: a value that cannot be used, or nothing left to train.
        """
        super().__init__(**rcnn_args)
        if training_schedule not in TRAINING:
            raise UserError(
                f"MODEL.PANOPTIC_FPN.TRAINING {training_schedule!r}: allowed are {list(TRAINING)}"
            )
        if self.proposal_generator is None and self.roi_heads is not None:
            raise UserError(
                "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals: Panoptic FPN makes its own "
                "proposals, set it to RPN"
            )
        self.sem_seg_head = sem_seg_head
        self.postprocess = PanopticPostprocessor(
            outputs=outputs,
            thing_sem_seg_ids=thing_sem_seg_ids,
            combine_overlap_thresh=combine_overlap_thresh,
            combine_stuff_area_thresh=combine_stuff_area_thresh,
            combine_instances_score_thresh=combine_instances_score_thresh,
            combine_nms_thresh=combine_nms_thresh,
        )
        self.instance_loss_weight = instance_loss_weight
        self.training_schedule = training_schedule
        self.feature_groups = feature_groups
        self.acceleration = acceleration or Acceleration()
        self.acceleration.apply(self)
        self.fixed_part = self.acceleration.fixed_part()
        branches = {"semantic": (getattr(sem_seg_head, "loss_weight", 1.0), [sem_seg_head])}
        if self.roi_heads is not None:
            modules = [self.proposal_generator, self.roi_heads]
            branches = {"instance": (instance_loss_weight, modules), **branches}
        self.tasks = tuple(task for task, (weight, _) in branches.items() if weight)
        if not self.tasks:
            raise UserError(
                "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT and MODEL.SEM_SEG_HEAD.LOSS_WEIGHT are "
                "both 0: nothing is left to train"
                if "instance" in branches
                else "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT is 0 and there are no thing classes: nothing "
                "is left to train"
            )
        for weight, modules in branches.values():
            if not weight:
                nn.ModuleList(modules).requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        cfg = resolve_config(cfg)
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
        has_things = cfg.MODEL.ROI_HEADS.NUM_CLASSES > 0
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes) if has_things else None,
            "roi_heads": build_roi_heads(cfg, shapes) if has_things else None,
            "sem_seg_head": build_sem_seg_head(cfg, shapes),
            **PanopticPostprocessor.from_config(cfg),
            "acceleration": Acceleration.from_config(cfg),
            "instance_loss_weight": cfg.MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT,
            "training_schedule": cfg.MODEL.PANOPTIC_FPN.TRAINING,
            "feature_groups": groups,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @on_own_gpu
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
            with self.acceleration.autocast(self.device):
                return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        tasks = self._tasks_of_iteration()
        losses = {}
        if "semantic" in tasks:
            maps = [x.to(self.device) for x in ground_truth(batched_inputs, "sem_seg")]
            sem_seg = padded(maps, self.backbone, self.sem_seg_head.ignore_value).tensor
            losses.update(self.sem_seg_head(self._features_for("semantic", features), sem_seg)[1])
        if "instance" in tasks:
            features = self._features_for("instance", features)
            instances = [x.to(self.device) for x in ground_truth(batched_inputs, "instances")]
            proposals, proposal_losses = self.proposal_generator(images, features, instances)
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                self.visualize_training(batched_inputs, proposals)
            _, roi_losses = self.roi_heads(images, planar(features), proposals, instances)
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
        if not do_postprocess:
            features = self.backbone(images.tensor)
            sem_seg, _ = self.sem_seg_head(self._features_for("semantic", features), None)
            return self._instances(images, self._features_for("instance", features)), sem_seg
        needs = {task: self.postprocess.needs(name) for task, name in OUTPUT_OF.items()}
        features, sem_seg, stride, rpn_outputs = self.fixed_part(
            self._network, self, images.tensor, **needs
        )
        instances = [None] * len(batched_inputs)
        if needs["instance"]:
            instances = self._instances(images, features, rpn_outputs)
        if sem_seg is None:
            sem_seg = [None] * len(batched_inputs)
        return [
            self.postprocess(*args, stride=stride)
            for args in zip(sem_seg, instances, images.image_sizes, batched_inputs, strict=True)
        ]

    def _network(
        self, images: torch.Tensor, *, semantic: bool, instance: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, int, Any]:
        """The part of inference whose shapes follow from that of the images.

        Returns:
            The features of the instance branch; the semantic logits and their stride, see
            :func:`logits_for_postprocessing`; what :meth:`LeanRPN.proposals_from` wants.
        """
        features = self.backbone(images)
        sem_seg, stride, rpn_outputs = None, 1, None
        if semantic:
            sem_seg, stride = logits_for_postprocessing(
                self.sem_seg_head, self._features_for("semantic", features)
            )
        features = self._features_for("instance", features)
        if instance and isinstance(self.proposal_generator, LeanRPN):
            rpn_outputs = self.proposal_generator.head_outputs(features)
        return features, sem_seg, stride, rpn_outputs

    def _instances(
        self, images: ImageList, features: dict[str, torch.Tensor], rpn_outputs: Any = None
    ) -> list[Instances]:
        """The instances of each network input, masks of boxes not yet pasted."""
        if self.roi_heads is None:
            return [_no_instances(size, self.device) for size in images.image_sizes]
        if rpn_outputs is None:
            proposals, _ = self.proposal_generator(images, features, None)
        else:
            proposals = self.proposal_generator.proposals_from(images, features, rpn_outputs)
        return self.roi_heads(images, planar(features), proposals, None)[0]

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


def _no_instances(image_size: tuple[int, int], device: torch.device) -> Instances:
    return Instances(
        image_size,
        pred_boxes=Boxes(torch.zeros(0, 4, device=device)),
        scores=torch.zeros(0, device=device),
        pred_classes=torch.zeros(0, dtype=torch.int64, device=device),
        pred_masks=torch.zeros(0, 1, 1, 1, device=device),
    )
