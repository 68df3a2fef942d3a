"""The semantic scores of the Cityscapes benchmark, in memory.

They equal those of cityscapesscripts, whose program wants every prediction as a file in one folder
(https://www.cityscapes-dataset.com/benchmarks).
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from cityscapesscripts.helpers.labels import name2label
from detectron2.data import Metadata

from ..data.targets import index_segments
from .base import Scores
from .common import check_size, classes_table, mean, metrics_table
from .panoptic_maps import joint_counts, read_ground_truth
from .sem_seg_iou import ConfusionCells, SemSegIoUEvaluator

logger = logging.getLogger(__name__)


class _InstancePixels(NamedTuple):
    """A true instance as the semantic prediction sees it.

    ``thing`` is its thing category; of its ``area`` pixels ``in_class`` are predicted as its class
    and ``in_category`` as one of its category.
    """

    thing: int
    area: int
    in_class: int
    in_category: int


class _Image(NamedTuple):
    confusion: ConfusionCells
    instances: list[_InstancePixels]


class CityscapesSemSegEvaluator(SemSegIoUEvaluator):
    """The scores of :class:`SemSegIoUEvaluator`, and those that Cityscapes has besides.

    iIoU is the IoU in which a true pixel of an instance weighs as much as the average size of its
    class by the instance's size. Both exist for categories (groups of classes) too.
    """

    def __init__(
        self, *, categories: Sequence[str], average_areas: Sequence[float], **sem_seg_args: Any
    ) -> None:
        """
        Args:
            categories: the category of each semantic class.
            average_areas: of the instances of each thing category, in pixels.
            sem_seg_args: those of :class:`SemSegIoUEvaluator`.
        """
        super().__init__(**sem_seg_args)
        self._category_names = list(dict.fromkeys(categories))
        self._category_of_class = np.array([self._category_names.index(c) for c in categories])
        self._average_areas = tuple(average_areas)

    @classmethod
    def dataset_arguments(cls, metadata: Metadata) -> dict[str, Any]:
        # Imported only now, as it looks for a dataset of its own.
        from cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling import args

        return {
            **super().dataset_arguments(metadata),
            "categories": [name2label[name].category for name in metadata.stuff_classes],
            "average_areas": [args.avgClassSize[name] for name in metadata.thing_classes],
        }

    def evaluate_image(
        self, record: Mapping[str, Any], prediction: torch.Tensor, source: str
    ) -> _Image:
        """As in :class:`SemSegIoUEvaluator`, with ``pan_seg_file_name`` and ``segments_info``."""
        gt_source, segments = record["pan_seg_file_name"], record["segments_info"]
        index = index_segments(read_ground_truth(gt_source), segments, source=gt_source)
        predicted = self._predicted_classes(prediction, source)
        check_size(source, predicted.shape, gt_source, index.shape)
        num_classes = len(self._class_names)
        counts = joint_counts(index, predicted, (len(segments) + 1, num_classes))
        confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        instances = []
        for info, row in zip(segments, counts[1:], strict=True):
            if not row.any():  # covered by others
                continue
            category = info["category_id"]
            true = self._thing_sem_seg_ids[category] if info["isthing"] else category
            confusion[true] += row
            if info["isthing"] and not info.get("iscrowd"):
                of_category = row[self._category_of_class == self._category_of_class[true]]
                pixels = map(int, (row.sum(), row[true], of_category.sum()))
                instances.append(_InstancePixels(category, *pixels))
        return _Image(ConfusionCells.of(confusion), instances)

    def confusions(self) -> list[ConfusionCells]:
        return [image.confusion for image in self.images.values()]

    def summarize(self, images: Mapping[Any, _Image]) -> Scores:
        """The metrics of all images, in percent.

        Returns:
            ``{"sem_seg": {...}}`` with those of :class:`SemSegIoUEvaluator` and ``IoU`` (mIoU),
            ``iIoU``, ``IoU_sup``, ``iIoU_sup`` (of categories), ``iIoU-<class>``,
            ``IoU_sup-<category>`` and ``iIoU_sup-<category>``. Averages leave out what is nan: a
            class or category neither true nor predicted.
        """
        confusion = self._confusion(image.confusion for image in images.values())
        instances = [instance for image in images.values() for instance in image.instances]
        scores = self._scores(confusion) | self._cityscapes_scores(confusion, instances)
        self._log_cityscapes(scores)
        return {"sem_seg": scores}

    def _cityscapes_scores(
        self, confusion: np.ndarray, instances: Sequence[_InstancePixels]
    ) -> dict[str, float]:
        category_of = self._category_of_class
        membership = np.eye(len(self._category_names), dtype=np.int64)[category_of]
        of_categories = membership.T @ confusion @ membership
        thing_classes = np.array(
            [self._thing_sem_seg_ids[k] for k in range(len(self._average_areas))]
        )

        iiou, iiou_sup = {}, {}
        for thing, true in enumerate(thing_classes):
            of_class = [i for i in instances if i.thing == thing]
            iiou[self._class_names[true]] = self._iiou(of_class, "in_class", confusion, true)
        for k, name in enumerate(self._category_names):
            if np.isin(np.flatnonzero(category_of == k), thing_classes).all():
                of_category = [i for i in instances if category_of[thing_classes[i.thing]] == k]
                iiou_sup[name] = self._iiou(of_category, "in_category", of_categories, k)
        iou_sup = dict(zip(self._category_names, _ious(of_categories), strict=True))
        return {
            "IoU": mean(_ious(confusion)),
            "iIoU": mean(iiou.values()),
            "IoU_sup": mean(iou_sup.values()),
            "iIoU_sup": mean(iiou_sup.values()),
            **{f"iIoU-{name}": value for name, value in iiou.items()},
            **{f"IoU_sup-{name}": value for name, value in iou_sup.items()},
            **{f"iIoU_sup-{name}": value for name, value in iiou_sup.items()},
        }

    def _iiou(
        self, instances: Iterable[_InstancePixels], correct: str, confusion: np.ndarray, true: int
    ) -> float:
        """The iIoU of row ``true`` of a confusion matrix, whose ``instances`` are given."""
        weighted = [(self._average_areas[i.thing], getattr(i, correct) / i.area) for i in instances]
        # Exact sums, so that the order of images does not matter.
        positives = math.fsum(weight for weight, _ in weighted)
        true_positives = math.fsum(weight * share for weight, share in weighted)
        false_positives = float(confusion[:, true].sum() - confusion[true, true])
        return _percent(true_positives, positives + false_positives)

    def _log_cityscapes(self, scores: Mapping[str, float]) -> None:
        metrics = ("IoU", "iIoU", "IoU_sup", "iIoU_sup")
        logger.info(
            "Cityscapes Semantic Segmentation Evaluation Results:\n"
            + metrics_table(scores, metrics)
        )
        for kind, names, of_kind in (
            ("class", self._class_names, metrics[:2]),
            ("category", self._category_names, metrics[2:]),
        ):
            logger.info(
                f"Per-{kind} Cityscapes Evaluation Results:\n"
                + classes_table(scores, of_kind, names, kind)
            )


def _ious(confusion: np.ndarray) -> list[float]:
    """The IoU of each row of a confusion matrix, in percent; nan where nothing was found."""
    correct = np.diagonal(confusion)
    unions = confusion.sum(axis=0) + confusion.sum(axis=1) - correct
    return [_percent(c, u) for c, u in zip(correct.tolist(), unions.tolist(), strict=True)]


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else math.nan
