"""Semantic segmentation metrics against panoptic ground truth, with no semantic PNGs needed."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..data.label_space import thing_sem_seg_ids
from ..data.targets import sem_seg_from_panoptic
from ..errors import UserError
from ..layers.argmax import argmax_classes
from .base import ImageEvaluator, Scores
from .bootstrap import interval
from .common import check_size, classes_table, metrics_table
from .panoptic_maps import joint_counts, read_ground_truth

logger = logging.getLogger(__name__)


class ConfusionCells(NamedTuple):
    """The cells of an image's confusion matrix, [true, predicted], that are not 0: a few of many.

    int32 arrays (N,): ``cells`` are their places in the flattened matrix, ``pixels`` their values.
    """

    cells: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> "ConfusionCells":
        cells = np.flatnonzero(confusion).astype(np.int32)
        return cls(cells, confusion.reshape(-1)[cells].astype(np.int32))


class SemSegIoUEvaluator(ImageEvaluator[ConfusionCells]):
    """IoU and accuracy of ``sem_seg``, with the keys of Detectron2's SemSegEvaluator.

    The values are those of Detectron2 v0.6, and so is ``mIoU`` where a class is predicted and
    nowhere true: it counts as 0, as in cityscapesscripts and MMSegmentation. (Detectron2's main
    branch leaves such a class out: that is the mean of the ``IoU-<name>`` that are not nan.)

    Works in one process or several. An image that comes twice counts once; of each, a few
    kilobytes are kept.
    """

    output_key = "sem_seg"

    def __init__(
        self,
        *,
        stuff_classes: Sequence[str],
        thing_sem_seg_ids: Sequence[int] | Mapping[int, int],
        ignore_label: int = 255,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            stuff_classes: names of the semantic classes.
            thing_sem_seg_ids: semantic class of each thing category.
            ignore_label: label of the pixels that are not evaluated.
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        super().__init__(distributed=distributed)
        self._class_names = list(stuff_classes)
        self._thing_sem_seg_ids = thing_sem_seg_ids
        self._ignore_label = ignore_label

    @classmethod
    def dataset_arguments(cls, metadata: Metadata) -> dict[str, Any]:
        return {
            "stuff_classes": metadata.stuff_classes,
            "thing_sem_seg_ids": thing_sem_seg_ids(metadata),
            "ignore_label": metadata.ignore_label,
        }

    def evaluate_image(
        self, record: Mapping[str, Any], prediction: torch.Tensor | np.ndarray, source: str
    ) -> ConfusionCells:
        """How many pixels of an image have each true and predicted class.

        Args:
            record: dataset dict with ``pan_seg_file_name`` and ``segments_info`` or with
                ``sem_seg_file_name``, an 8-bit grey image of labels.
            prediction: ``sem_seg``: logits (C, H, W), as a model returns them, or classes (H, W),
                integers, as they are saved.

        Raises:
            UserError: prediction and ground truth differ in size or classes, or a ground truth
                file cannot be read or holds labels that are no class.
        """
        gt_source, gt = self._ground_truth(record)
        predicted = self._predicted_classes(prediction, source)
        check_size(source, predicted.shape, gt_source, gt.shape)
        num_classes = len(self._class_names)
        counts = joint_counts(gt, predicted, (256, num_classes))
        counts[self._ignore_label] = 0
        unknown = np.flatnonzero(counts[num_classes:].any(axis=1)) + num_classes
        if len(unknown):
            raise UserError(
                f"{gt_source}: labels {unknown.tolist()} are neither one of the {num_classes} "
                f"classes nor the ignore label {self._ignore_label}"
            )
        return ConfusionCells.of(counts[:num_classes])

    def summarize(self, images: Mapping[Any, ConfusionCells]) -> Scores:
        """The metrics of all images, in percent.

        Returns:
            ``{"sem_seg": {...}}`` with ``mIoU``, ``fwIoU``, ``IoU-<name>``, ``mACC``, ``pACC`` and
            ``ACC-<name>``; nan for a class that is nowhere true.
        """
        return {"sem_seg": self._scores(self._confusion(images.values()))}

    def confusions(self) -> list[ConfusionCells]:
        """Those of all images, after :meth:`evaluate`."""
        return list(self.images.values())

    def confusion(self) -> np.ndarray:
        """Their sum: int64 array (C, C), [true, predicted]."""
        return self._confusion(self.confusions())

    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """That of ``mIoU``."""
        number = len(self._class_names)
        images = self.confusions()
        cells = [np.unravel_index(image.cells, (number, number)) for image in images]
        counts = np.zeros((3, len(cells), number))  # correct, true, predicted
        for k, (image, (true, predicted)) in enumerate(zip(images, cells, strict=True)):
            correct = true == predicted
            np.add.at(counts[0, k], true[correct], image.pixels[correct])
            np.add.at(counts[1, k], true, image.pixels)
            np.add.at(counts[2, k], predicted, image.pixels)

        def mean_iou(weights: np.ndarray) -> np.ndarray:
            correct, true, predicted = weights @ counts
            union = true + predicted - correct
            iou = np.divide(correct, union, out=np.zeros_like(union), where=union > 0)
            return 100 * iou.sum(1) / np.maximum((union > 0).sum(1), 1)

        return {"sem_seg": {"mIoU": interval(mean_iou, len(cells))}} if cells else {}

    def _confusion(self, images: Iterable[ConfusionCells]) -> np.ndarray:
        """The confusion matrix of several images: int64 array (C, C), [true, predicted]."""
        num_classes = len(self._class_names)
        confusion = np.zeros(num_classes**2, dtype=np.int64)
        for image in images:
            confusion[image.cells] += image.pixels
        return confusion.reshape(num_classes, num_classes)

    def _scores(self, confusion: np.ndarray) -> dict[str, float]:
        """The metrics of a confusion matrix, in percent; they are logged."""
        correct = np.diagonal(confusion)
        true = confusion.sum(axis=1)
        predicted = confusion.sum(axis=0)
        if not true.any():
            logger.warning(
                "Semantic segmentation: no labelled pixels to evaluate, so the metrics are nan"
            )
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan on purpose
            accuracy = 100 * correct / true
            iou = np.where(true > 0, 100 * correct / (true + predicted - correct), np.nan)
            scores = {
                "mIoU": np.nansum(iou) / np.count_nonzero(true + predicted),
                "fwIoU": np.nansum(iou * true) / true.sum(),
                **self._by_class("IoU", iou),
                "mACC": np.nansum(accuracy) / np.count_nonzero(true),
                "pACC": 100 * correct.sum() / true.sum(),
                **self._by_class("ACC", accuracy),
            }
        scores = {key: float(value) for key, value in scores.items()}
        logger.info(
            "Semantic Segmentation Evaluation Results:\n"
            + metrics_table(scores, ("mIoU", "fwIoU", "mACC", "pACC"))
        )
        logger.info(
            "Per-class Semantic Segmentation Evaluation Results:\n"
            + classes_table(scores, ("IoU", "ACC"), self._class_names)
        )
        return scores

    def _by_class(self, metric: str, values: np.ndarray) -> dict[str, float]:
        names = (f"{metric}-{name}" for name in self._class_names)
        return dict(zip(names, values, strict=True))

    def _ground_truth(self, record: Mapping[str, Any]) -> tuple[str, np.ndarray]:
        """The file of the ground truth, and its labels: uint8 array (H, W)."""
        if "pan_seg_file_name" in record:
            file_name = record["pan_seg_file_name"]
            return file_name, sem_seg_from_panoptic(
                read_ground_truth(file_name),
                record["segments_info"],
                thing_sem_seg_ids=self._thing_sem_seg_ids,
                ignore_label=self._ignore_label,
                source=file_name,
            )
        if "sem_seg_file_name" in record:
            return record["sem_seg_file_name"], read_labels(record["sem_seg_file_name"])
        raise UserError(
            f"{record['file_name']}: no semantic ground truth; its dataset dict needs "
            "pan_seg_file_name or sem_seg_file_name"
        )

    def _predicted_classes(self, prediction: torch.Tensor | np.ndarray, source: str) -> np.ndarray:
        """The predicted classes: uint8 array (H, W)."""
        if prediction.ndim == 2:
            classes = prediction.cpu().numpy() if torch.is_tensor(prediction) else prediction
            if classes.size and not 0 <= classes.min() <= classes.max() < len(self._class_names):
                raise UserError(
                    f"{source} has classes {classes.min()}..{classes.max()}, but the dataset has "
                    f"{len(self._class_names)}"
                )
            return classes.astype(np.uint8)
        logits = torch.as_tensor(prediction)
        if logits.shape[0] != len(self._class_names):
            raise UserError(
                f"{source} has {logits.shape[0]} semantic classes, "
                f"but the dataset has {len(self._class_names)}; set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
        return argmax_classes(logits).byte().cpu().numpy()  # bytes for a small transfer


def read_labels(file_name: str) -> np.ndarray:
    """The labels in an 8-bit grey image: uint8 array (H, W).

    Raises:
        UserError: it cannot be read, or is another kind of image.
    """
    try:
        with PathManager.open(file_name, "rb") as file:
            image = Image.open(file)
            if image.mode != "L":
                raise UserError(
                    f"{file_name}: an image of mode {image.mode}; expected 8-bit grey (L), "
                    "with the label of each pixel as its value"
                )
            return np.asarray(image)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged PNGs
        raise UserError(f"{file_name}: cannot read the semantic ground truth: {error}") from error
