"""From the raw outputs of both branches to the outputs of an image."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from ..config import OUTPUTS
from ..errors import UserError
from ..layers.pasting import PastedMasks
from ..layers.resizing import upsampled, upsampled_labels
from .merging import merge_panoptic, merges_at_once


class PanopticPostprocessor:
    """Brings instances and semantic logits to the size of the original image and merges them."""

    @configurable
    def __init__(
        self,
        *,
        outputs: Sequence[str] = OUTPUTS,
        thing_sem_seg_ids: Collection[int] = (0,),
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
        combine_nms_thresh: float = 1.0,
    ) -> None:
        """
        Args:
            outputs: what to return, of ``sem_seg``, ``instances`` and ``panoptic_seg``.
            thing_sem_seg_ids, combine_overlap_thresh, combine_stuff_area_thresh,
                combine_instances_score_thresh, combine_nms_thresh: see :func:`merge_panoptic`.
        """
        if not outputs or set(outputs) - set(OUTPUTS):
            raise UserError(
                f"MODEL.PANOPTIC_FPN.OUTPUTS {list(outputs)}: allowed are one or more of "
                f"{list(OUTPUTS)}"
            )
        self.outputs = frozenset(outputs)
        self.merging = {
            "thing_sem_seg_ids": frozenset(thing_sem_seg_ids),
            "overlap_threshold": combine_overlap_thresh,
            "stuff_area_thresh": combine_stuff_area_thresh,
            "instances_score_thresh": combine_instances_score_thresh,
            "nms_thresh": combine_nms_thresh,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.PANOPTIC_FPN
        return {
            "outputs": keys.OUTPUTS,
            "thing_sem_seg_ids": keys.THING_SEM_SEG_IDS,
            "combine_overlap_thresh": keys.COMBINE.OVERLAP_THRESH,
            "combine_stuff_area_thresh": keys.COMBINE.STUFF_AREA_LIMIT,
            "combine_instances_score_thresh": keys.COMBINE.INSTANCES_CONFIDENCE_THRESH,
            "combine_nms_thresh": keys.COMBINE.NMS_THRESH,
        }

    def needs(self, branch: str) -> bool:
        """Whether the outputs need a branch: ``sem_seg`` or ``instances``."""
        return branch in self.outputs or "panoptic_seg" in self.outputs

    def __call__(
        self,
        sem_seg: torch.Tensor | None,
        instances: Instances | None,
        image_size: tuple[int, int],
        inputs: dict[str, Any],
        *,
        stride: int = 1,
    ) -> dict[str, Any]:
        """The outputs of one image.

        Args:
            sem_seg: (num_classes, H / stride, W / stride) logits of the padded network input, if
                needed.
            instances: of the network input, masks of boxes not yet pasted, if needed.
            image_size: (height, width) of the network input without padding.
            inputs: the image's input dict; its ``height`` and ``width`` are the size of the
                outputs, by default ``image_size``.
            stride: of the logits.

        Returns:
            Those of ``outputs``: ``sem_seg`` (num_classes, height, width) logits, ``instances``,
            ``panoptic_seg`` (see :func:`merge_panoptic`).
        """
        size = inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
        sizes = {"stride": stride, "image_size": image_size, "size": size}
        result: dict[str, Any] = {}
        device = (instances.scores if sem_seg is None else sem_seg).device
        # Resizing and pasting are matrix products, but no place for half precision.
        with torch.autocast(device.type, enabled=False):
            if "sem_seg" in self.outputs:
                result["sem_seg"], labels = upsampled(sem_seg, **sizes)
            elif "panoptic_seg" in self.outputs:
                labels = upsampled_labels(sem_seg, **sizes)
            if instances is not None:
                # To know which boxes have an area is to wait for a GPU.
                all_of_them = "instances" not in self.outputs and merges_at_once(labels)
                instances = _rescaled(instances, size, drop_empty=not all_of_them)
                if "instances" in self.outputs and instances.has("pred_masks"):
                    instances.pred_masks.dense()  # merging takes its parts from there
            if "panoptic_seg" in self.outputs:
                result["panoptic_seg"] = merge_panoptic(
                    instances, labels, num_classes=len(sem_seg), **self.merging
                )
            if "instances" in self.outputs:
                if instances.has("pred_masks"):
                    instances.pred_masks = instances.pred_masks.dense()
                result["instances"] = instances
        return result


def _rescaled(instances: Instances, size: tuple[int, int], *, drop_empty: bool = True) -> Instances:
    """Instances at the size of the original image, masks as :class:`PastedMasks`; without
    ``drop_empty`` also those whose box has no area there."""
    fields = dict(instances.get_fields())
    if not drop_empty:
        boxes = fields["pred_boxes"].tensor.clone()
        for axis in (0, 1):
            length, before = size[1 - axis], instances.image_size[1 - axis]
            boxes[:, axis::2].mul_(length / before).clamp_(0, length)
        fields["pred_boxes"] = Boxes(boxes)
        # As if the others had been dropped.
        fields["numbers"] = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).cumsum(0) - 1
        fields["pred_masks"] = PastedMasks(fields["pred_masks"][:, 0], boxes, size)
        return Instances(size, **fields)
    # Under another name, detector_postprocess selects the masks but does not paste them.
    masks = fields.pop("pred_masks", None)
    if masks is not None:
        fields["mask_probabilities"] = masks
    instances = detector_postprocess(Instances(instances.image_size, **fields), *size)
    if masks is not None:
        probabilities = instances.mask_probabilities[:, 0]
        instances.remove("mask_probabilities")
        instances.pred_masks = PastedMasks(probabilities, instances.pred_boxes.tensor, size)
    return instances
