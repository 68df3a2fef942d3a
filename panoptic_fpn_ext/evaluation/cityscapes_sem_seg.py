"""The semantic scores of the Cityscapes benchmark, in memory.

They equal those of cityscapesscripts, whose program wants every prediction as a file in one folder
(https://www.cityscapes-dataset.com/benchmarks).
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cityscapesscripts.helpers.labels import name2label
from detectron2.data import MetadataCatalog

from ..data.targets import index_segments
from .common import check_size, gather, mean, pipe_table
from .panoptic_maps import joint_counts, read_ground_truth
from .sem_seg_iou import SemSegIoUEvaluator

logger = logging.getLogger(__name__)


class _SeenInstance(NamedTuple):
    """How the semantic prediction sees a true instance; numbers of pixels."""

    category: int
    area: int
    in_class: int
    in_category: int


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
        names = list(dict.fromkeys(categories))
        self._category_names = names
        self._category_of_class = np.array([names.index(name) for name in categories])
        self._average_areas = tuple(average_areas)

    @classmethod
    def from_dataset(
        cls, dataset_name: str, *, distributed: bool = True
    ) -> "CityscapesSemSegEvaluator":
        """The evaluator of a registered dataset that has the classes of Cityscapes."""
        # Imported only now, as it looks for a dataset of its own.
        from cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling import args

        metadata = MetadataCatalog.get(dataset_name)
        return cls(
            stuff_classes=metadata.stuff_classes,
            thing_sem_seg_ids=metadata.thing_sem_seg_ids,
            ignore_label=metadata.ignore_label,
            categories=[name2label[name].category for name in metadata.stuff_classes],
            average_areas=[args.avgClassSize[name] for name in metadata.thing_classes],
            distributed=distributed,
        )

    def reset(self) -> None:
        super().reset()
        self._instances: list[_SeenInstance] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the pixels of some images.

        Args:
            inputs: dataset dicts with ``file_name``, ``pan_seg_file_name`` and ``segments_info``.
            outputs: dicts with ``sem_seg``: logits, tensor (C, H, W) on any device.

        Raises:
            UserError: prediction and ground truth differ in size or classes.
        """
        for record, output in zip(inputs, outputs, strict=True):
            gt_source, segments = record["pan_seg_file_name"], record["segments_info"]
            index = index_segments(read_ground_truth(gt_source), segments, source=gt_source)
            pred = self._prediction(record, output)
            check_size(record, pred.shape, gt_source, index.shape)
            counts = joint_counts(index, pred, (len(segments) + 1, len(self._class_names)))
            for info, row in zip(segments, counts[1:], strict=True):
                category = info["category_id"]
                true = self._thing_sem_seg_ids[category] if info["isthing"] else category
                self._confusion[true] += row
                if info["isthing"] and not info.get("iscrowd"):
                    of_category = row[self._category_of_class == self._category_of_class[true]]
                    pixels = map(int, (row.sum(), row[true], of_category.sum()))
                    self._instances.append(_SeenInstance(category, *pixels))

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """The metrics of all images, in percent.

        Returns:
            ``{"sem_seg": {...}}`` with those of :class:`SemSegIoUEvaluator` and ``IoU`` (mIoU),
            ``iIoU``, ``IoU_sup``, ``iIoU_sup`` (of categories), ``iIoU-<class>``,
            ``IoU_sup-<category>`` and ``iIoU_sup-<category>``. Averages leave out what is nan: a
            class or category neither true nor predicted. None in all processes but the first.
        """
        parts = gather((self._confusion, self._instances), distributed=self._distributed)
        if parts is None:
            return None
        confusion = np.sum([part for part, _ in parts], axis=0)
        instances = [instance for _, part in parts for instance in part]
        result = self._scores(confusion)
        self._log(result)
        result |= self._cityscapes_scores(confusion, instances)
        self._log_cityscapes(result)
        return OrderedDict({"sem_seg": result})

    def _cityscapes_scores(
        self, confusion: np.ndarray, instances: Sequence[_SeenInstance]
    ) -> dict[str, float]:
        category_of = self._category_of_class
        membership = np.eye(len(self._category_names), dtype=np.int64)[category_of]
        of_categories = membership.T @ confusion @ membership
        things = np.array(self._thing_sem_seg_ids)

        iiou, iiou_sup = {}, {}
        for thing, true in enumerate(things):
            of_class = [i for i in instances if i.category == thing]
            iiou[self._class_names[true]] = self._iiou(of_class, "in_class", confusion, true)
        for k, name in enumerate(self._category_names):
            if np.isin(np.flatnonzero(category_of == k), things).all():
                of_category = [i for i in instances if category_of[things[i.category]] == k]
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
        self, instances: Iterable[_SeenInstance], correct: str, confusion: np.ndarray, true: int
    ) -> float:
        """The iIoU of row ``true`` of a confusion matrix, whose ``instances`` are given."""
        weighted = [
            (self._average_areas[i.category], getattr(i, correct) / i.area) for i in instances
        ]
        # Exact sums, so that the order of images does not matter.
        positives = math.fsum(weight for weight, _ in weighted)
        true_positives = math.fsum(weight * share for weight, share in weighted)
        false_positives = float(confusion[:, true].sum() - confusion[true, true])
        return _percent(true_positives, positives + false_positives)

    def _log_cityscapes(self, result: Mapping[str, float]) -> None:
        metrics = ("IoU", "iIoU", "IoU_sup", "iIoU_sup")
        logger.info(
            "Cityscapes Semantic Segmentation Evaluation Results:\n"
            + pipe_table(metrics, [[result[metric] for metric in metrics]])
        )
        for kind, names, columns in (
            ("class", self._class_names, metrics[:2]),
            ("category", self._category_names, metrics[2:]),
        ):
            rows = [
                (name, *(result.get(f"{column}-{name}") for column in columns)) for name in names
            ]
            logger.info(
                f"Per-{kind} Cityscapes Evaluation Results:\n" + pipe_table((kind, *columns), rows)
            )


def _ious(confusion: np.ndarray) -> list[float]:
    """The IoU of each row of a confusion matrix, in percent; nan where nothing was found."""
    correct = np.diagonal(confusion)
    unions = confusion.sum(axis=0) + confusion.sum(axis=1) - correct
    return [_percent(c, u) for c, u in zip(correct.tolist(), unions.tolist(), strict=True)]


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else math.nan
