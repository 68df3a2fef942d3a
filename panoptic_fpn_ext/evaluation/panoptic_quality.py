"""Panoptic quality (https://arxiv.org/abs/1801.00868), counted image by image in memory."""

import logging
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..errors import UserError
from .common import gather_images, pipe_table
from .panoptic_maps import read_ground_truth
from .panoptic_matching import Category, CategoryMatches, category_of, match_segments

logger = logging.getLogger(__name__)


class PanopticQualityEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ of ``panoptic_seg`` against panoptic PNGs.

    Works in one process or several, and gives the same numbers to the last digit however images
    are ordered and spread over processes. An image that comes twice counts once.
    """

    def __init__(
        self,
        *,
        thing_classes: Sequence[str],
        stuff_classes: Sequence[str],
        thing_sem_seg_ids: Sequence[int],
        distributed: bool = True,
    ) -> None:
        """
        Args:
            thing_classes: names of the thing categories.
            stuff_classes: names of the semantic classes.
            thing_sem_seg_ids: semantic class of each thing category; these classes are no stuff
                categories of their own.
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        self._names: dict[Category, str] = {(True, i): n for i, n in enumerate(thing_classes)}
        self._names |= {
            (False, i): n for i, n in enumerate(stuff_classes) if i not in set(thing_sem_seg_ids)
        }
        self._distributed = distributed
        self.reset()

    @classmethod
    def from_dataset(
        cls, dataset_name: str, *, distributed: bool = True
    ) -> "PanopticQualityEvaluator":
        """The evaluator of a registered dataset, from its metadata."""
        metadata = MetadataCatalog.get(dataset_name)
        return cls(
            thing_classes=metadata.thing_classes,
            stuff_classes=metadata.stuff_classes,
            # Detectron2's own panoptic datasets are separated: class 0 is "things".
            thing_sem_seg_ids=metadata.get("thing_sem_seg_ids", (0,)),
            distributed=distributed,
        )

    def reset(self) -> None:
        self._images: dict[Hashable, dict[Category, CategoryMatches]] = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Match the segments of some images.

        Args:
            inputs: dataset dicts with ``file_name``, ``image_id``, ``pan_seg_file_name`` and
                ``segments_info``.
            outputs: dicts with ``panoptic_seg``: integer tensor (H, W) of segment ids, on any
                device, and its ``segments_info``.

        Raises:
            UserError: see :func:`match_segments`; also a segment of an unknown category.
        """
        for record, output in zip(inputs, outputs, strict=True):
            if "pan_seg_file_name" not in record:
                raise UserError(
                    f"{record['file_name']}: no panoptic ground truth; its dataset dict needs "
                    "pan_seg_file_name and segments_info, as register_panoptic_dataset gives them"
                )
            gt_source = record["pan_seg_file_name"]
            pred_source = f"the prediction for {record['file_name']}"
            # Image ids of datasets evaluated together may coincide, their files do not.
            key = record["image_id"], gt_source
            if key in self._images:
                continue
            if "panoptic_seg" not in output:
                raise UserError(f"{pred_source} has no panoptic_seg, only {sorted(output)}")
            pred_ids, pred_segments = output["panoptic_seg"]
            matches = match_segments(
                read_ground_truth(gt_source),
                record["segments_info"],
                _to_numpy(pred_ids),
                pred_segments,
                gt_source=gt_source,
                pred_source=pred_source,
            )
            self._check_categories(record["segments_info"], gt_source)
            self._check_categories(pred_segments, pred_source)
            self._images[key] = matches

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """The panoptic qualities of all images, in percent.

        Returns:
            ``{"panoptic_seg": {...}}`` with ``PQ``, ``SQ``, ``RQ``, the same with ``_th`` and
            ``_st`` for things and stuff, and ``PQ-<name>``, ``SQ-<name>``, ``RQ-<name>`` for each
            category. Averages are over the categories that have a segment, true or predicted;
            a category or an average without any is nan (panopticapi has 0 for such a category
            and fails for such an average). None in all processes but the first.
        """
        images = gather_images(self._images, distributed=self._distributed)
        if images is None:
            return None

        totals = {category: CategoryMatches() for category in self._names}
        for matches in images.values():
            for category, of_image in matches.items():
                totals[category].add(of_image)

        splits = {
            "All": list(totals.values()),
            "Things": [total for (isthing, _), total in totals.items() if isthing],
            "Stuff": [total for (isthing, _), total in totals.items() if not isthing],
        }
        summary = [_average(name, split) for name, split in splits.items()]
        result: dict[str, float] = {}
        for suffix, (_, pq, sq, rq, _) in zip(("", "_th", "_st"), summary, strict=True):
            result |= {f"PQ{suffix}": pq, f"SQ{suffix}": sq, f"RQ{suffix}": rq}
        for metric in ("PQ", "SQ", "RQ"):
            for category, total in totals.items():
                result[f"{metric}-{self._names[category]}"] = 100 * getattr(total, metric.lower())

        self._log(len(images), summary, totals)
        return OrderedDict({"panoptic_seg": result})

    def _check_categories(self, segments: Iterable[Mapping[str, Any]], source: str) -> None:
        for segment in segments:
            if category_of(segment) not in self._names:
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
                self._names[category],
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


def _to_numpy(ids: torch.Tensor | np.ndarray) -> np.ndarray:
    return ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
