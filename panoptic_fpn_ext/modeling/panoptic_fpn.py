"""Panoptic FPN: one network for instance, semantic and panoptic segmentation."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_sem_seg_head
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import ImageList
from torch import nn

from ..config import OUTPUTS, resolve_dataset_keys
from ..errors import UserError
from .merging import merge_panoptic


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
        thing_sem_seg_ids: Sequence[int] = (0,),
        outputs: Sequence[str] = OUTPUTS,
        instance_loss_weight: float = 1.0,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: int = 4096,
        combine_instances_score_thresh: float = 0.5,
        **rcnn_args: Any,
    ) -> None:
        """
        Args:
            sem_seg_head: the semantic branch.
            thing_sem_seg_ids: semantic classes that never become stuff segments.
            outputs: what inference returns, of ``sem_seg``, ``instances`` and ``panoptic_seg``.
            instance_loss_weight: λi, on the losses of the ROI heads.
            combine_overlap_thresh, combine_stuff_area_thresh, combine_instances_score_thresh: see
                :func:`merge_panoptic`.
            rcnn_args: those of :class:`GeneralizedRCNN`.
        """
        super().__init__(**rcnn_args)
        unknown = set(outputs) - set(OUTPUTS)
        if unknown or not outputs:
            raise UserError(
                f"MODEL.PANOPTIC_FPN.OUTPUTS {list(outputs)}: allowed are one or more of "
                f"{list(OUTPUTS)}"
            )
        self.sem_seg_head = sem_seg_head
        self.thing_sem_seg_ids = frozenset(thing_sem_seg_ids)
        self.outputs = frozenset(outputs)
        self.instance_loss_weight = instance_loss_weight
        self.combine_overlap_thresh = combine_overlap_thresh
        self.combine_stuff_area_thresh = combine_stuff_area_thresh
        self.combine_instances_score_thresh = combine_instances_score_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        cfg = resolve_dataset_keys(cfg)
        args = super().from_config(cfg)
        keys = cfg.MODEL.PANOPTIC_FPN
        args.update(
            sem_seg_head=build_sem_seg_head(cfg, args["backbone"].output_shape()),
            thing_sem_seg_ids=keys.THING_SEM_SEG_IDS,
            outputs=keys.OUTPUTS,
            instance_loss_weight=keys.INSTANCE_LOSS_WEIGHT,
            combine_overlap_thresh=keys.COMBINE.OVERLAP_THRESH,
            combine_stuff_area_thresh=keys.COMBINE.STUFF_AREA_LIMIT,
            combine_instances_score_thresh=keys.COMBINE.INSTANCES_CONFIDENCE_THRESH,
        )
        return args

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """
        Args:
            batched_inputs: a dict for each image, as :class:`PanopticFPNMapper` makes them:
                ``image`` (C, H, W); in training ``instances`` and ``sem_seg`` (H, W); in inference
                optionally ``height`` and ``width`` of the outputs.

        Returns:
            In training the losses; in inference a dict for each image with those of ``outputs``:

            * ``sem_seg``: (num_classes, height, width) logits;
            * ``instances``: :class:`Instances` with boxes, scores, classes and masks;
            * ``panoptic_seg``: see :func:`merge_panoptic`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)

        sem_seg = self._pad([x["sem_seg"].to(self.device) for x in batched_inputs])
        _, losses = self.sem_seg_head(features, sem_seg)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        proposals, proposal_losses = self.proposal_generator(images, features, instances)
        _, roi_losses = self.roi_heads(images, features, proposals, instances)
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
        features = self.backbone(images.tensor)
        need = OUTPUTS if not do_postprocess or "panoptic_seg" in self.outputs else self.outputs
        sem_seg = instances = [None] * len(batched_inputs)
        if "sem_seg" in need:
            sem_seg, _ = self.sem_seg_head(features, None)
        if "instances" in need:
            proposals, _ = self.proposal_generator(images, features, None)
            instances, _ = self.roi_heads(images, features, proposals, None)
        if not do_postprocess:
            return instances, sem_seg
        return [
            self._postprocess(*args)
            for args in zip(sem_seg, instances, images.image_sizes, batched_inputs, strict=True)
        ]

    def _postprocess(
        self, sem_seg: Any, instances: Any, image_size: tuple[int, int], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The outputs of one image, at the size of the original image."""
        size = inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
        result = {}
        if sem_seg is not None:
            result["sem_seg"] = sem_seg_postprocess(sem_seg, image_size, *size)
        if instances is not None:
            result["instances"] = detector_postprocess(instances, *size)
        if "panoptic_seg" in self.outputs:
            result["panoptic_seg"] = merge_panoptic(
                result["instances"],
                result["sem_seg"].argmax(dim=0),
                thing_sem_seg_ids=self.thing_sem_seg_ids,
                overlap_threshold=self.combine_overlap_thresh,
                stuff_area_limit=self.combine_stuff_area_thresh,
                score_threshold=self.combine_instances_score_thresh,
            )
        return {name: value for name, value in result.items() if name in self.outputs}

    def _pad(self, sem_seg: list[torch.Tensor]) -> torch.Tensor:
        """Semantic maps as one batch, padded as :meth:`preprocess_image` pads the images."""
        args = [self.backbone.size_divisibility, self.sem_seg_head.ignore_value]
        if hasattr(self.backbone, "padding_constraints"):  # newer than Detectron2 v0.6
            args.append(self.backbone.padding_constraints)
        return ImageList.from_tensors(sem_seg, *args).tensor
