"""Panoptic quality (https://arxiv.org/abs/1801.00868), counted image by image in memory."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata

from ..data.label_space import thing_sem_seg_ids
from ..errors import UserError
from .analysis import PanopticImage, analysis, image_counts, mean_pq, resampled_pq, totals_of
from .base import ImageEvaluator, Scores
from .bootstrap import ends, resamples
from .boundary import boundary_iou
from .common import pipe_table
from .panoptic_maps import read_ground_truth
from .panoptic_matching import Category, CategoryMatches, category_of, segment_table

logger = logging.getLogger(__name__)


class PanopticQualityEvaluator(ImageEvaluator[PanopticImage]):
    """PQ, SQ and RQ of ``panoptic_seg`` against panoptic PNGs.

    Works in one process or several, and gives the same numbers to the last digit however images
    are ordered and spread over processes. An image that comes twice counts once.
    """

    output_key = "panoptic_seg"

    def __init__(
        self,
        *,
        thing_classes: Sequence[str],
        stuff_classes: Sequence[str],
        thing_sem_seg_ids: Iterable[int],
        boundary: bool = False,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            thing_classes: names of the thing categories.
            stuff_classes: names of the semantic classes.
            thing_sem_seg_ids: the semantic classes of things, which are no stuff categories.
            boundary: give Boundary PQ, too: https://arxiv.org/abs/2103.16562
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        super().__init__(distributed=distributed)
        self.boundary = boundary
        of_things = set(thing_sem_seg_ids)
        self.names: dict[Category, str] = {
            **{(True, i): name for i, name in enumerate(thing_classes)},
            **{(False, i): name for i, name in enumerate(stuff_classes) if i not in of_things},
        }

    @classmethod
    def dataset_arguments(cls, metadata: Metadata) -> dict[str, Any]:
        return {
            "thing_classes": metadata.thing_classes,
            "stuff_classes": metadata.stuff_classes,
            "thing_sem_seg_ids": thing_sem_seg_ids(metadata).values(),
        }

    def evaluate_image(
        self,
        record: Mapping[str, Any],
        prediction: tuple[torch.Tensor | np.ndarray, Sequence[Mapping[str, Any]]],
        source: str,
    ) -> PanopticImage:
        """The matches and errors of the segments of an image.

        Args:
            record: dataset dict with ``pan_seg_file_name`` and ``segments_info``.
            prediction: ``panoptic_seg``: integer tensor (H, W) of segment ids, and its
                ``segments_info``.

        Raises:
            UserError: see :func:`match_segments`; also a segment of an unknown category.
        """
        if "pan_seg_file_name" not in record:
            raise UserError(
                f"{record['file_name']}: no panoptic ground truth; its dataset dict needs "
                "pan_seg_file_name and segments_info, as register_panoptic_dataset gives them"
            )
        gt_source = record["pan_seg_file_name"]
        gt_ids, (pred_ids, pred_segments) = read_ground_truth(gt_source), prediction
        is_tensor = isinstance(pred_ids, torch.Tensor)
        pred_ids = pred_ids.cpu().numpy() if is_tensor else np.asarray(pred_ids)
        table = segment_table(
            gt_ids,
            record["segments_info"],
            pred_ids,
            pred_segments,
            gt_source=gt_source,
            pred_source=source,
        )
        self._check_categories(record["segments_info"], gt_source)
        self._check_categories(pred_segments, source)
        iou = boundary_iou(table, gt_ids, pred_ids) if self.boundary else None
        return PanopticImage.of(table, iou)

    def summarize(self, images: Mapping[Any, PanopticImage]) -> Scores:
        """The panoptic qualities of all images, in percent.

        Returns:
            ``{"panoptic_seg": {...}}`` with ``PQ``, ``SQ``, ``RQ``, the same with ``_th`` and
            ``_st`` for things and stuff, and ``PQ-<name>``, ``SQ-<name>``, ``RQ-<name>`` for each
            category. Averages are over the categories that have a segment, true or predicted;
            a category or an average without any is nan (panopticapi has 0 for such a category
            and fails for such an average). With ``boundary`` also ``boundary_PQ``, the same with
            ``_th`` and ``_st``.
        """
        totals = self._totals(image.matches for image in images.values())

        splits = {
            "All": list(totals.values()),
            "Things": [total for (isthing, _), total in totals.items() if isthing],
            "Stuff": [total for (isthing, _), total in totals.items() if not isthing],
        }
        summary = [_average(name, split) for name, split in splits.items()]
        scores: dict[str, float] = {}
        for suffix, (_, pq, sq, rq, _) in zip(("", "_th", "_st"), summary, strict=True):
            scores |= {f"PQ{suffix}": pq, f"SQ{suffix}": sq, f"RQ{suffix}": rq}
        for metric in ("PQ", "SQ", "RQ"):
            for category, total in totals.items():
                scores[f"{metric}-{self.names[category]}"] = 100 * getattr(total, metric.lower())

        if self.boundary:
            of_borders = self._totals(image.boundary or {} for image in images.values())
            scores |= {f"boundary_{key}": value for key, value in mean_pq(of_borders).items()}
        self._log(len(images), summary, totals)
        return {"panoptic_seg": scores}

    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Those of ``PQ``, ``PQ_th`` and ``PQ_st``."""
        if not self.images:
            return {}
        counts = image_counts([i.matches for i in self.images.values()], list(self.names))
        samples = resampled_pq(counts, list(self.names), resamples(len(self.images)))
        return {"panoptic_seg": {key: ends(values) for key, values in samples.items()}}

    def analysis(self) -> dict[str, Any]:
        """What is lost where, after :meth:`evaluate`; see :func:`~.analysis.analysis`."""
        return analysis(self.images.values(), self.names)

    def totals(self) -> dict[Category, CategoryMatches]:
        """The matches of all images, of each category, after :meth:`evaluate`."""
        return self._totals(image.matches for image in self.images.values())

    def _totals(
        self, images: Iterable[Mapping[Category, CategoryMatches]]
    ) -> dict[Category, CategoryMatches]:
        return totals_of(images, self.names)

    def _check_categories(self, segments: Iterable[Mapping[str, Any]], source: str) -> None:
        for segment in segments:
            if category_of(segment) not in self.names:
                kind = "thing" if segment["isthing"] else "stuff"
                raise UserError(
                    f"{source}: segment {segment['id']} has category_id {segment['category_id']}, "
                    f"which is no {kind} category of the dataset"
                )

    def _log(
        self,
        num_images: int,
        summary: list[tuple[str, float, float, float, int]],
        totals: Mapping[Category, CategoryMatches],
    ) -> None:
        logger.info(
            f"Panoptic Evaluation Results on {num_images} images:\n"
            + pipe_table(["", "PQ", "SQ", "RQ", "#categories"], summary)
        )
        rows = [
            (
                self.names[category],
                *(100 * quality for quality in (total.pq, total.sq, total.rq)),
                *(total.true_positives, total.false_positives, total.false_negatives),
            )
            for category, total in totals.items()
        ]
        logger.info(
            "Per-category Panoptic Evaluation Results:\n"
            + pipe_table(["category", "PQ", "SQ", "RQ", "TP", "FP", "FN"], rows)
        )


def _average(name: str, split: Sequence[CategoryMatches]) -> tuple[str, float, float, float, int]:
    """Row of the summary: name, PQ, SQ and RQ in percent, number of categories with segments."""
    present = [total for total in split if not math.isnan(total.pq)]
    if not present:
        if split:
            logger.warning(f"Panoptic quality of {name}: no segments to evaluate, so it is nan")
        return name, math.nan, math.nan, math.nan, 0
    means = (
        100 * math.fsum(getattr(total, metric) for total in present) / len(present)
        for metric in ("pq", "sq", "rq")
    )
    return name, *means, len(present)
