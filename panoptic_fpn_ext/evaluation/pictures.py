"""Pictures of what is predicted, beside the ground truth; in training, among its curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

from ..data.image_files import read_image
from ..data.label_space import thing_sem_seg_ids, with_isthing
from ..data.panoptic_png import read_panoptic_png
from ..visualization import (
    Segments,
    agreeing_colors,
    draw_panoptic,
    instance_map,
    semantic_map,
)
from .common import check_size
from .sem_seg_iou import read_labels

HEIGHT = 240  # of pictures in curves, in pixels
GAP = 6  # white pixels between them

PanopticMap = tuple[torch.Tensor | np.ndarray, Segments]
"""(H, W) integers, segment ids, and the segments."""


class PredictionPictures(DatasetEvaluator):
    """Puts the first images of a dataset, as they are, predicted and true, among training's events.

    It scores nothing, and does nothing outside a training. The first process alone draws: of the
    images that it evaluates, which with the same number of processes are the same each time.
    """

    def __init__(self, *, dataset_name: str, number: int, score_threshold: float = 0.5) -> None:
        """
        Args:
            dataset_name: what is evaluated; its metadata has names and colours.
            number: of images.
            score_threshold: of the instances drawn where there is no panoptic output.
        """
        self._name = dataset_name
        self._number = number
        self._threshold = score_threshold
        self._drawn = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> "PredictionPictures":
        return cls(
            dataset_name=dataset_name,
            number=cfg.TEST.PICTURES,
            score_threshold=cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH,
        )

    def reset(self) -> None:
        self._drawn = 0

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Draw, if these are among the first images.

        The picture of image k is ``predictions/<dataset>/<k>_<file name>``.

        Args:
            inputs: dataset dicts.
            outputs: the model's outputs. Drawn is ``panoptic_seg``; without it ``sem_seg`` and the
                masks of ``instances``, those that are there.

        Raises:
            UserError: an image or its ground truth cannot be read, or they differ in size.
        """
        storage = _storage()
        if storage is None or not comm.is_main_process():
            return
        metadata = MetadataCatalog.get(self._name)
        for record, output in zip(inputs, outputs, strict=True):
            if self._drawn == self._number:
                return
            self._drawn += 1
            maps = predicted_maps(output, self._threshold)
            picture = _side_by_side(pictures(record, maps, metadata, HEIGHT))
            name = f"predictions/{self._name}/{self._drawn}_{Path(record['file_name']).stem}"
            storage.put_image(name, picture.transpose(2, 0, 1))

    def evaluate(self) -> None:
        return None


def predicted_maps(output: Mapping[str, Any], score_threshold: float) -> list[PanopticMap]:
    """What can be drawn of an image's outputs: the panoptic map, else one for each task.

    Args:
        output: see :meth:`PredictionPictures.process`.
        score_threshold: of instances; where they overlap, that of the higher score is seen.
    """
    if "panoptic_seg" in output:
        return [output["panoptic_seg"]]
    maps = []
    if "sem_seg" in output:
        maps.append(semantic_map(output["sem_seg"]))
    if "instances" in output and output["instances"].has("pred_masks"):
        maps.append(instance_map(output["instances"], score_threshold))
    return maps


def pictures(
    record: Mapping[str, Any], predictions: Sequence[PanopticMap], metadata: Metadata, height: int
) -> list[np.ndarray]:
    """An image, the predictions and the ground truth, if any, segments that match in one colour.

    Args:
        record: its dataset dict, with ``pan_seg_file_name`` and ``segments_info``, or
            ``sem_seg_file_name``, where there is ground truth.
        predictions: for the image, in its size.
        metadata: see :func:`draw_panoptic`.
        height: of each picture.

    Returns:
        (``height``, W, 3) uint8 each, RGB.

    Raises:
        UserError: the image or its ground truth cannot be read, or they differ in size.
    """
    image = read_image(dict(record), "RGB")
    scale = height / image.shape[0]
    size = max(1, round(image.shape[1] * scale)), height
    shown = [
        cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    ]
    truth = _true_map(record, metadata, image.shape[:2])
    colors = None
    for prediction in predictions:
        if truth is not None:
            colors, _ = agreeing_colors(prediction, truth, metadata)
        shown.append(draw_panoptic(image, *prediction, metadata, colors=colors, scale=scale))
    if truth is not None:
        shown.append(draw_panoptic(image, *truth, metadata, scale=scale))
    return shown


def _true_map(
    record: Mapping[str, Any], metadata: Metadata, size: Sequence[int]
) -> PanopticMap | None:
    if "pan_seg_file_name" in record:
        source = record["pan_seg_file_name"]
        ids = read_panoptic_png(source)
        segments = with_isthing(record["segments_info"], thing_sem_seg_ids(metadata))
    elif "sem_seg_file_name" in record:
        source = record["sem_seg_file_name"]
        ids = read_labels(source)
        ignored = metadata.get("ignore_label", 255)
        segments = [
            {"id": label, "isthing": False, "category_id": label}
            for label in np.unique(ids).tolist()
            if label != ignored
        ]
    else:
        return None
    check_size(record["file_name"], size, source, ids.shape)
    return ids, segments


def _side_by_side(shown: Sequence[np.ndarray]) -> np.ndarray:
    gap = np.full((shown[0].shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([part for picture in shown for part in (picture, gap)][:-1])


def _storage() -> EventStorage | None:
    """Where a training's events go; None outside one."""
    try:
        return get_event_storage()
    except AssertionError:
        return None
