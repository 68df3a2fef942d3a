"""From a record of a dataset to the model's input."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks, polygons_to_bitmask
from pycocotools import mask as rle

from ..errors import UserError
from .augmentation import PanopticAugInput, build_augmentation
from .image_files import check_size, read_image
from .label_space import thing_sem_seg_ids, with_isthing
from .panoptic_png import read_panoptic_png
from .targets import index_segments, instance_values, instances_from_index, sem_seg_from_index


class PanopticFPNMapper(DatasetMapper):
    """Detectron2's mapper, with the targets of both branches read from the panoptic PNG.

    Adds to a record:

    * ``image``: (C, H, W) uint8 tensor;
    * ``sem_seg``, in training: (H, W) int64 tensor of semantic classes, void ``ignore_label``;
    * ``instances``, in training: from the record's ``annotations`` where it has them, else from the
      panoptic PNG. Masks are :class:`BitMasks`; for ``instance_mask_format`` ``"polygon"`` they are
      :class:`PolygonMasks` where all annotations are polygons and the image is not cropped.

    In training, records without ``pan_seg_file_name``, those of Detectron2's own datasets, are
    mapped as Detectron2 does.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        thing_sem_seg_ids: Mapping[int, int],
        ignore_label: int,
        **detectron2_args: Any,
    ) -> None:
        """
        Args:
            is_train: whether to make targets.
            thing_sem_seg_ids: thing category -> semantic class, see
                :func:`~panoptic_fpn_ext.data.label_space.thing_sem_seg_ids`.
            ignore_label: the semantic class of void, 0 to 255.
            detectron2_args: those of :class:`detectron2.data.DatasetMapper`.
        """
        super().__init__(is_train, **detectron2_args)
        if not 0 <= ignore_label <= 255:
            raise UserError(f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE {ignore_label}: must be 0 to 255")
        self.thing_sem_seg_ids = dict(thing_sem_seg_ids)
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        augmentations = build_augmentation(cfg, is_train)
        args = super().from_config(cfg, is_train)
        args["augmentations"] = augmentations
        args["ignore_label"] = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        args["thing_sem_seg_ids"] = {}
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        if names:
            try:
                args["thing_sem_seg_ids"] = thing_sem_seg_ids(MetadataCatalog.get(names[0]))
            except UserError:  # annotations that are not here, which predicting does not need
                if is_train:
                    raise
        return args

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record; it is not modified.

        Raises:
            UserError: an image or a panoptic PNG that does not fit its record.
        """
        if self.is_train and "pan_seg_file_name" not in dataset_dict:
            return super().__call__(dataset_dict)
        dataset_dict = dict(dataset_dict)
        image = read_image(dataset_dict, self.image_format)
        # Records of Detectron2's own panoptic datasets lack these.
        dataset_dict.setdefault("height", image.shape[0])
        dataset_dict.setdefault("width", image.shape[1])
        segments_info = with_isthing(dataset_dict.get("segments_info", ()), self.thing_sem_seg_ids)
        if not self.is_train:
            if "segments_info" in dataset_dict:
                dataset_dict["segments_info"] = segments_info
            dataset_dict.pop("annotations", None)
            aug_input = T.AugInput(image)
            transforms = self.augmentations(aug_input)
            self._add_image(dataset_dict, aug_input.image, transforms)
            return dataset_dict

        del dataset_dict["segments_info"]
        png = dataset_dict["pan_seg_file_name"]
        index = index_segments(read_panoptic_png(png), segments_info, source=png)
        check_size(png, index.shape, dataset_dict)
        aug_input = PanopticAugInput(
            image, index=index, instance_values=instance_values(segments_info)
        )
        transforms = self.augmentations(aug_input)
        self._add_image(dataset_dict, aug_input.image, transforms)
        sem_seg = sem_seg_from_index(
            aug_input.index,
            segments_info,
            thing_sem_seg_ids=self.thing_sem_seg_ids,
            ignore_label=self.ignore_label,
        )
        dataset_dict["sem_seg"] = torch.from_numpy(sem_seg).long()
        if "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, aug_input.image.shape[:2])
        else:
            dataset_dict["instances"] = instances_from_index(
                aug_input.index, segments_info, with_masks=self.use_instance_mask
            )
        return dataset_dict

    def _add_image(
        self, dataset_dict: dict[str, Any], image: np.ndarray, transforms: T.TransformList
    ) -> None:
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.proposal_topk is not None:
            utils.transform_proposals(
                dataset_dict, image.shape[:2], transforms, proposal_topk=self.proposal_topk
            )

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple
    ) -> None:
        """Replace ``annotations`` with ``instances``; those with no pixel left are dropped."""
        annotations = [dict(a) for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        segmentations = [a.pop("segmentation", None) for a in annotations]
        boxes = _transform_boxes(annotations, transforms, image_shape)
        for annotation, box in zip(annotations, boxes, strict=True):
            annotation["bbox"], annotation["bbox_mode"] = box, BoxMode.XYXY_ABS
            keypoints = annotation.pop("keypoints", None)
            if self.use_keypoint and keypoints is not None:
                annotation["keypoints"] = utils.transform_keypoint_annotations(
                    keypoints, transforms, image_shape, self.keypoint_hflip_indices
                )
        instances = utils.annotations_to_instances(annotations, image_shape)
        if self.use_instance_mask:
            instances.gt_masks = self._masks(segmentations, transforms, image_shape, dataset_dict)
            if self.recompute_boxes:
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)

    def _masks(
        self,
        segmentations: list[Any],
        transforms: T.TransformList,
        image_shape: tuple[int, int],
        record: Mapping[str, Any],
    ) -> BitMasks | PolygonMasks:
        """The masks of the instances of an image, all of one kind.

        Args:
            segmentations: polygons, RLE or arrays of the size of the record's image.
            transforms: those of the image.
            image_shape: its height and width after them.
            record: the record, for its size and for error messages.
        """
        if any(segmentation is None for segmentation in segmentations):
            raise UserError(
                f"{record['file_name']}: an instance annotation has no 'segmentation'; instances "
                "with boxes alone need MODEL.MASK_ON False"
            )
        # A cropped polygon would have to be clipped; clipping its mask is exact and needs nothing.
        cropped = any(isinstance(t, T.CropTransform) for t in transforms.transforms)
        if (
            self.instance_mask_format == "polygon"
            and not cropped
            and all(isinstance(segmentation, list) for segmentation in segmentations)
        ):
            return PolygonMasks(_transform_polygons(segmentations, transforms))
        masks = np.zeros((len(segmentations), *image_shape), dtype=bool)
        for mask, segmentation in zip(masks, segmentations, strict=True):
            if isinstance(segmentation, list):
                (polygons,) = _transform_polygons([segmentation], transforms)
                mask[:] = polygons_to_bitmask(polygons, *image_shape)
                continue
            if isinstance(segmentation, dict):
                segmentation = rle.decode(segmentation)
            segmentation = np.asarray(segmentation, dtype=np.uint8)
            if segmentation.shape != (record["height"], record["width"]):
                raise UserError(
                    f"{record['file_name']}: the mask of an instance annotation is not of the "
                    "image's size"
                )
            mask[:] = transforms.apply_segmentation(segmentation)
        return BitMasks(torch.from_numpy(masks))


def _transform_boxes(
    annotations: list[dict[str, Any]], transforms: T.TransformList, image_shape: tuple[int, int]
) -> np.ndarray:
    """The boxes of annotations, transformed and clipped: (N, 4), x0, y0, x1, y1.

    All at once; one by one they would take longer than decoding the image's PNG.
    """
    boxes = np.zeros((len(annotations), 4))
    for mode in {annotation["bbox_mode"] for annotation in annotations}:
        of_mode = [k for k, annotation in enumerate(annotations) if annotation["bbox_mode"] == mode]
        original = np.array([annotations[k]["bbox"] for k in of_mode], dtype=np.float64)
        boxes[of_mode] = BoxMode.convert(original, mode, BoxMode.XYXY_ABS)
    height, width = image_shape
    return np.clip(transforms.apply_box(boxes), 0, (width, height, width, height))


def _transform_polygons(
    segmentations: list[list[Any]], transforms: T.TransformList
) -> list[list[np.ndarray]]:
    """The polygons [x0, y0, x1, y1, ...] of each instance, transformed but not clipped."""
    polygons = [np.reshape(p, (-1, 2)) for s in segmentations for p in s]
    # A new array even where there is only one polygon, since transforms work in place.
    coordinates = np.concatenate([np.zeros((0, 2)), *polygons])
    ends = np.cumsum([len(p) for p in polygons])
    transformed = iter(np.split(transforms.apply_coords(coordinates), ends[:-1]))
    return [[next(transformed).reshape(-1) for _ in s] for s in segmentations]
