"""The instance scores of the Cityscapes benchmark, in memory.

They equal those of cityscapesscripts, whose program wants every prediction as a file in one folder
(https://www.cityscapes-dataset.com/benchmarks).
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cityscapesscripts.helpers.labels import labels, name2label
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError
from .base import ImageEvaluator, Scores
from .common import check_size, classes_table, mean, metrics_table

logger = logging.getLogger(__name__)

OVERLAPS = np.arange(0.5, 1.0, 0.05)
"""The IoUs that an instance is to exceed; AP is the average over them."""
MIN_INSTANCE_AREA = 100  # pixels; smaller true instances are not evaluated


class _Detections(NamedTuple):
    """What the detections of one image are worth; arrays (N,), and one (number of classes,).

    ``gt`` is the number, in the image, of the true instance that a detection covers by an IoU of
    more than 0.5, ``iou``; -1 if there is none, or one that is not evaluated (a group, a small
    one): then the detection neither counts nor harms. ``ignored`` is the share of a detection on
    void, groups and small instances. ``positives``: the evaluated true instances of each class.
    """

    category: np.ndarray
    score: np.ndarray
    iou: np.ndarray
    gt: np.ndarray
    ignored: np.ndarray
    positives: np.ndarray


class CityscapesInstanceEvaluator(ImageEvaluator[_Detections]):
    """AP of ``instances`` by the rules of Cityscapes, against the ``instanceIds`` PNGs.

    Works in one process or several, and gives the same numbers to the last digit however images
    are ordered and spread over processes. An image that comes twice counts once.
    """

    output_key = "instances"

    def __init__(
        self,
        *,
        thing_classes: Sequence[str],
        label_ids: Sequence[int],
        void_label_ids: Iterable[int],
        gt_dir: str | os.PathLike,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            thing_classes: names of the thing categories.
            label_ids: the Cityscapes label of each thing category.
            void_label_ids: the labels that are not evaluated.
            gt_dir: folder of the ground truth, in which each city has one.
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        super().__init__(distributed=distributed)
        self._class_names = list(thing_classes)
        self._label_ids = tuple(label_ids)
        self._void_label_ids = frozenset(void_label_ids)
        self._gt_dir = str(gt_dir)

    @classmethod
    def dataset_arguments(cls, metadata: Metadata) -> dict[str, Any]:
        return {
            "thing_classes": metadata.thing_classes,
            "label_ids": [name2label[name].id for name in metadata.thing_classes],
            "void_label_ids": [label.id for label in labels if label.ignoreInEval],
            "gt_dir": metadata.gt_dir,
        }

    def evaluate_image(
        self, record: Mapping[str, Any], prediction: Instances, source: str
    ) -> _Detections:
        """Compare the instances of an image with the true ones.

        Args:
            record: dataset dict with ``image_id``, such as ``"ulm_000000_000019"``.
            prediction: ``instances``: ``pred_masks`` (N, H, W), ``pred_classes``, ``scores``.

        Raises:
            UserError: an ``instanceIds`` PNG cannot be read, or a prediction is not of its size.
        """
        image_id = record["image_id"]
        city = image_id.partition("_")[0]
        gt_source = os.path.join(self._gt_dir, city, f"{image_id}_gtFine_instanceIds.png")
        gt = _read_instance_ids(gt_source)
        check_size(source, prediction.pred_masks.shape[1:], gt_source, gt.shape)
        return self._compare(gt, prediction)

    def _compare(self, gt: np.ndarray, instances: Instances) -> _Detections:
        """Compare detections with a map of instance ids, (H, W)."""
        pixels_of_id = np.bincount(gt.reshape(-1))
        ids = np.flatnonzero(pixels_of_id)
        areas = pixels_of_id[ids]
        number_of_id = np.zeros(len(pixels_of_id), dtype=np.uint16)
        number_of_id[ids] = np.arange(len(ids))
        masks = instances.pred_masks.cpu().numpy()
        intersections = _count_values(number_of_id[gt], len(ids), masks)  # (N, ids)

        # An id is label * 1000 + number for an instance, the label for all else.
        is_instance = ids >= 1000
        evaluated = is_instance & (areas >= MIN_INSTANCE_AREA)
        gt_labels = np.where(is_instance, ids // 1000, ids)
        positives = [np.count_nonzero(evaluated & (gt_labels == i)) for i in self._label_ids]

        not_empty = intersections.any(axis=1)
        intersections = intersections[not_empty]
        category = instances.pred_classes.cpu().numpy()[not_empty]
        score = instances.scores.cpu().double().numpy()[not_empty]
        area = intersections.sum(axis=1)
        same_label = gt_labels == np.array(self._label_ids)[category][:, None]
        union = areas + area[:, None] - intersections
        ious = np.where(same_label, intersections / union, 0.0)
        best_gt = ious.argmax(axis=1)
        # A small group is ignored twice, as in cityscapesscripts.
        times_ignored = (~is_instance).astype(int) + (areas < MIN_INSTANCE_AREA)
        ignored = np.isin(ids, list(self._void_label_ids)) + same_label * times_ignored
        return _Detections(
            category=category,
            score=score,
            iou=ious.max(axis=1),
            gt=np.where(evaluated[best_gt], best_gt, -1),
            ignored=(ignored * intersections).sum(axis=1) / area,
            positives=np.array(positives),
        )

    def summarize(self, images: Mapping[Any, _Detections]) -> Scores:
        """The average precisions of all images, in percent.

        Returns:
            ``{"segm": {...}}`` with ``AP``, ``AP50``, ``AP-<name>`` and ``AP50-<name>``; nan for a
            class without a true instance, which the averages leave out.
        """
        precisions = np.full((len(self._class_names), len(OVERLAPS)), np.nan)
        if images:
            detections = _concatenate(list(images.values()))
            for k in np.flatnonzero(detections.positives):
                for j, overlap in enumerate(OVERLAPS):
                    precisions[k, j] = 100 * _average_precision(detections, k, overlap)
        by_class = list(zip(self._class_names, precisions.tolist(), strict=True))
        scores = {
            "AP": mean(precisions.reshape(-1)),
            "AP50": mean(precisions[:, 0]),
            **{f"AP-{name}": math.fsum(row) / len(row) for name, row in by_class},
            **{f"AP50-{name}": row[0] for name, row in by_class},
        }
        title = "Cityscapes Instance Segmentation Evaluation Results:\n"
        metrics = ("AP", "AP50")
        logger.info(title + metrics_table(scores, metrics))
        logger.info("Per-class " + title + classes_table(scores, metrics, self._class_names))
        return {"segm": scores}


def _concatenate(images: Sequence[_Detections]) -> _Detections:
    """The detections of several images as one; true instances are numbered throughout."""
    columns = {name: np.concatenate([getattr(i, name) for i in images]) for name in _PER_DETECTION}
    image_number = np.repeat(np.arange(len(images)), [len(i.gt) for i in images])
    numbers_per_image = max(i.gt.max(initial=-1) for i in images) + 1
    gt = columns["gt"]
    columns["gt"] = np.where(gt >= 0, image_number * numbers_per_image + gt, -1)
    return _Detections(**columns, positives=np.sum([i.positives for i in images], axis=0))


_PER_DETECTION = [name for name in _Detections._fields if name != "positives"]


def _average_precision(detections: _Detections, category: int, overlap: float) -> float:
    """The area under the precision-recall curve, by the trapezoid rule."""
    of_class = detections.category == category
    score, iou, gt, ignored = (
        column[of_class]
        for column in (detections.score, detections.iou, detections.gt, detections.ignored)
    )
    hit = iou > overlap
    # Of several detections of one true instance the best is right, and the others are wrong.
    matched = np.flatnonzero(hit & (gt >= 0))
    matched = matched[np.lexsort((-score[matched], gt[matched]))]
    is_best = np.ones(len(matched), dtype=bool)
    is_best[1:] = gt[matched][1:] != gt[matched][:-1]
    unmatched = np.flatnonzero(~hit & (ignored <= overlap))

    scores = np.concatenate((score[matched], score[unmatched]))
    right = np.concatenate((is_best, np.zeros(len(unmatched), dtype=bool)))
    order = np.argsort(-scores)
    scores, num_right = scores[order], np.cumsum(right[order])
    # Detections of one score stand or fall together.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else order
    precision = np.concatenate(([1.0], num_right[last] / (last + 1)))
    recall = np.concatenate(([0.0], num_right[last] / detections.positives[category]))
    return float((np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum())


def _count_values(values: np.ndarray, num_values: int, masks: np.ndarray) -> np.ndarray:
    """How many pixels of each value, of a map (H, W), lie in each mask (N, H, W): (N, values)."""
    pixels = np.zeros((len(masks), num_values), dtype=np.int64)
    for row, mask in zip(pixels, masks.astype(bool, copy=False), strict=True):
        mask_rows = np.flatnonzero(mask.any(axis=1))
        if len(mask_rows):
            window = slice(mask_rows[0], mask_rows[-1] + 1)
            row[:] = np.bincount(values[window][mask[window]], minlength=num_values)
    return pixels


def _read_instance_ids(file_name: str) -> np.ndarray:
    """The ids in an ``instanceIds`` PNG: integer array (H, W)."""
    try:
        with PathManager.open(file_name, "rb") as file:
            ids = np.asarray(Image.open(file))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged PNGs
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file_name}: cannot read the instance ids: {reason}") from error
    if ids.ndim != 2 or ids.dtype == np.uint8:
        raise UserError(f"{file_name}: expected a 16-bit grey PNG of instance ids")
    return ids
