"""From a record of a dataset to the model's input."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..errors import UserError
from .panoptic_png import read_panoptic_png
from .targets import index_segments, instances_from_index, sem_seg_from_index, transform_index


class PanopticFPNMapper(DatasetMapper):
    """Detectron2's mapper, with the targets of both branches read from the panoptic PNG.

    Adds to a record:

    * ``image``: (C, H, W) uint8 tensor;
    * ``sem_seg``, in training: (H, W) int64 tensor of semantic classes, void ``ignore_label``;
    * ``instances``, in training: from the record's ``annotations`` where it has them, else from the
      panoptic PNG (masks as :class:`BitMasks`).

    Records without ``pan_seg_file_name`` (those of Detectron2's own datasets) are mapped as
    Detectron2 does.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        thing_sem_seg_ids: Sequence[int],
        ignore_label: int,
        **detectron2_args: Any,
    ) -> None:
        """
        Args:
            is_train: whether to make targets.
            thing_sem_seg_ids: the semantic class of each thing category.
            ignore_label: the semantic class of void.
            detectron2_args: those of :class:`detectron2.data.DatasetMapper`.
        """
        super().__init__(is_train, **detectron2_args)
        self.thing_sem_seg_ids = tuple(thing_sem_seg_ids)
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        args = super().from_config(cfg, is_train)
        args["ignore_label"] = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        args["thing_sem_seg_ids"] = ()
        if is_train and cfg.DATASETS.TRAIN:
            metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
            args["thing_sem_seg_ids"] = metadata.get("thing_sem_seg_ids", ())
        return args

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record; it is not modified.

        Raises:
            UserError: an image or a panoptic PNG that does not fit its record.
        """
        if "pan_seg_file_name" not in dataset_dict:
            return super().__call__(dataset_dict)
        dataset_dict = dict(dataset_dict)
        image = self._read_image(dataset_dict)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        annotations = dataset_dict.pop("annotations", None)
        if not self.is_train:
            return dataset_dict

        png, segments_info = dataset_dict["pan_seg_file_name"], dataset_dict.pop("segments_info")
        index = index_segments(read_panoptic_png(png), segments_info, source=png)
        if index.shape != (dataset_dict["height"], dataset_dict["width"]):
            raise UserError(
                f"{png}: {index.shape[1]}x{index.shape[0]} pixels, but its image has "
                f"{dataset_dict['width']}x{dataset_dict['height']}"
            )
        index = transform_index(index, transforms)
        sem_seg = sem_seg_from_index(
            index,
            segments_info,
            thing_sem_seg_ids=self.thing_sem_seg_ids,
            ignore_label=self.ignore_label,
        )
        dataset_dict["sem_seg"] = torch.as_tensor(sem_seg.astype("long"))
        if annotations is None:
            dataset_dict["instances"] = instances_from_index(index, segments_info)
        else:
            dataset_dict["annotations"] = copy.deepcopy(annotations)
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _read_image(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        try:
            image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
            utils.check_image_size(dataset_dict, image)
        except (OSError, SyntaxError, utils.SizeMismatchError) as error:
            raise UserError(f"{dataset_dict['file_name']}: {error}") from error
        return image
