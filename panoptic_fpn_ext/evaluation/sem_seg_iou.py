"""Semantic segmentation metrics against panoptic ground truth, with no semantic PNGs needed."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..data.targets import sem_seg_from_panoptic
from ..errors import UserError
from ..layers.argmax import argmax_classes
from .common import check_size, gather, pipe_table
from .panoptic_maps import joint_counts, read_ground_truth

logger = logging.getLogger(__name__)


class SemSegIoUEvaluator(DatasetEvaluator):
    """IoU and accuracy of ``sem_seg``, with the keys and values of Detectron2's SemSegEvaluator.

    Works in one process or several. Only a confusion matrix is kept.
    """

    def __init__(
        self,
        *,
        stuff_classes: Sequence[str],
        thing_sem_seg_ids: Sequence[int],
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
        self._class_names = list(stuff_classes)
        self._thing_sem_seg_ids = tuple(thing_sem_seg_ids)
        self._ignore_label = ignore_label
        self._distributed = distributed
        self.reset()

    @classmethod
    def from_dataset(cls, dataset_name: str, *, distributed: bool = True) -> "SemSegIoUEvaluator":
        """The evaluator of a registered dataset, from its metadata."""
        metadata = MetadataCatalog.get(dataset_name)
        return cls(
            stuff_classes=metadata.stuff_classes,
            # Detectron2's own panoptic datasets are separated: class 0 is "things".
            thing_sem_seg_ids=metadata.get("thing_sem_seg_ids", (0,)),
            ignore_label=metadata.ignore_label,
            distributed=distributed,
        )

    def reset(self) -> None:
        num_classes = len(self._class_names)
        self._confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # [true, predicted]

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the pixels of some images.

        Args:
            inputs: dataset dicts with ``file_name`` and either ``pan_seg_file_name`` and
                ``segments_info`` or ``sem_seg_file_name``, an 8-bit grey image of labels.
            outputs: dicts with ``sem_seg``: logits, tensor (C, H, W) on any device.

        Raises:
            UserError: prediction and ground truth differ in size or classes, or a ground truth
                file cannot be read or holds labels that are no class.
        """
        for record, output in zip(inputs, outputs, strict=True):
            gt_source, gt = self._ground_truth(record)
            pred = self._prediction(record, output)
            check_size(record, pred.shape, gt_source, gt.shape)
            num_classes = len(self._class_names)
            counts = joint_counts(gt, pred, (256, num_classes))
            counts[self._ignore_label] = 0
            unknown = np.flatnonzero(counts[num_classes:].any(axis=1)) + num_classes
            if len(unknown):
                raise UserError(
                    f"{gt_source}: labels {unknown.tolist()} are neither one of the {num_classes} "
                    f"classes nor the ignore label {self._ignore_label}"
                )
            self._confusion += counts[:num_classes]

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """The metrics of all images, in percent.

        Returns:
            ``{"sem_seg": {...}}`` with ``mIoU`` (a class that is predicted, but nowhere true,
            counts as 0), ``fwIoU``, ``IoU-<name>``, ``mACC``, ``pACC`` and ``ACC-<name>``; nan for
            a class that is nowhere true. None in all processes but the first.
        """
        parts = gather(self._confusion, distributed=self._distributed)
        if parts is None:
            return None
        confusion = np.sum(parts, axis=0)
        result = self._scores(confusion)
        self._log(result)
        return OrderedDict({"sem_seg": result})

    def _scores(self, confusion: np.ndarray) -> dict[str, float]:
        """The metrics of a confusion matrix, [true, predicted], in percent."""
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
            result = {
                "mIoU": np.nansum(iou) / np.count_nonzero(true + predicted),
                "fwIoU": np.nansum(iou * true) / true.sum(),
                **{
                    f"IoU-{name}": value for name, value in zip(self._class_names, iou, strict=True)
                },
                "mACC": np.nansum(accuracy) / np.count_nonzero(true),
                "pACC": 100 * correct.sum() / true.sum(),
                **{
                    f"ACC-{name}": value
                    for name, value in zip(self._class_names, accuracy, strict=True)
                },
            }
        return {key: float(value) for key, value in result.items()}

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
            return record["sem_seg_file_name"], _read_labels(record["sem_seg_file_name"])
        raise UserError(
            f"{record['file_name']}: no semantic ground truth; its dataset dict needs "
            "pan_seg_file_name or sem_seg_file_name"
        )

    def _prediction(self, record: Mapping[str, Any], output: Mapping[str, Any]) -> np.ndarray:
        """The predicted classes: integer array (H, W)."""
        if "sem_seg" not in output:
            raise UserError(
                f"the prediction for {record['file_name']} has no sem_seg, only {sorted(output)}"
            )
        logits = output["sem_seg"]
        if logits.shape[0] != len(self._class_names):
            raise UserError(
                f"the prediction for {record['file_name']} has {logits.shape[0]} semantic classes, "
                f"but the dataset has {len(self._class_names)}; set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
        return argmax_classes(logits).byte().cpu().numpy()  # uint8 for a small transfer

    def _log(self, result: Mapping[str, float]) -> None:
        metrics = ("mIoU", "fwIoU", "mACC", "pACC")
        logger.info(
            "Semantic Segmentation Evaluation Results:\n"
            + pipe_table(metrics, [[result[metric] for metric in metrics]])
        )
        rows = [(name, result[f"IoU-{name}"], result[f"ACC-{name}"]) for name in self._class_names]
        logger.info(
            "Per-class Semantic Segmentation Evaluation Results:\n"
            + pipe_table(("class", "IoU", "ACC"), rows)
        )


def _read_labels(file_name: str) -> np.ndarray:
    """The labels in an 8-bit grey image: uint8 array (H, W)."""
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
