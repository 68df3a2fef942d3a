"""COCO box and mask AP (https://cocodataset.org/#detection-eval), for any panoptic dataset."""

import copy
import logging
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.faster_eval_api_cpp import COCOevalAccumulate as accumulate

from ..data.coco_json import instances_faults, is_polygon, raise_first, read_json
from ..data.targets import index_segments
from ..errors import UserError
from .base import ImageEvaluator, Scores
from .bootstrap import interval
from .common import check_size, pipe_table
from .panoptic_maps import read_ground_truth
from .rle import encode_masks

logger = logging.getLogger(__name__)

RESULTS_NAME = "coco_instances_results.json"  # as Detectron2's
AP_SAMPLES = 200  # of the bootstrap: each takes as long as the end of an evaluation
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass
class ImageInstances:
    """What is kept of an image.

    Attributes:
        size: height and width.
        boxes: float32 array (N, 4) of predicted boxes: x, y, width, height.
        scores: float32 array (N,).
        classes: int64 array (N,) of contiguous thing categories.
        masks: the run-length encoding of each predicted mask, None if the model predicts none.
        annotations: the ground truth of :func:`instance_annotations`, None if it is in a JSON file.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[bytes] | None
    annotations: list[dict[str, Any]] | None


def instance_annotations(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The things of a panoptic PNG as COCO annotations, crowds as ``iscrowd``.

    Args:
        record: dataset dict with ``pan_seg_file_name`` and ``segments_info``.

    Returns:
        Dicts with ``category_id`` (contiguous), ``iscrowd``, ``area``, ``bbox`` (tight) and
        ``segmentation`` (run-length encoded, ``counts`` as bytes).

    Raises:
        UserError: see :func:`read_panoptic_png` and :func:`index_segments`.
    """
    source, segments_info = record["pan_seg_file_name"], record["segments_info"]
    index = index_segments(read_ground_truth(source), segments_info, source=source)
    things = [(place, info) for place, info in enumerate(segments_info, 1) if info["isthing"]]
    places = np.array([place for place, _ in things], dtype=index.dtype)
    rles = encode_masks(index == places[:, None, None])
    annotations = []
    for (_, info), rle in zip(things, rles, strict=True):
        area = int(mask_util.area(rle))
        if not area:  # covered by others
            continue
        annotations.append(
            {
                "category_id": info["category_id"],
                "iscrowd": info.get("iscrowd", 0),
                "area": area,
                "bbox": mask_util.toBbox(rle).tolist(),
                "segmentation": rle,
            }
        )
    return annotations


class InstanceAPEvaluator(ImageEvaluator[ImageInstances]):
    """Box and mask AP of ``instances``, with the keys and values of Detectron2's COCOEvaluator,
    and the file of predictions that it writes.

    The images that were processed are evaluated, one that comes twice once. Works in one process
    or several, and gives the same numbers to the last digit however images are ordered and spread
    over processes. Masks are kept run-length encoded, in memory.
    """

    output_key = "instances"

    def __init__(
        self,
        *,
        thing_classes: Sequence[str],
        json_file: str | None = None,
        dataset_id_to_contiguous_id: Mapping[int, int] | None = None,
        results_file: str | os.PathLike | None = None,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            thing_classes: names of the thing categories.
            json_file: COCO instance annotations; without it the things of the panoptic PNGs are
                the ground truth.
            dataset_id_to_contiguous_id: the category ids of the dataset and the contiguous ones;
                by default they are the same.
            results_file: where to write the predictions in the COCO result format
                (https://cocodataset.org/#format-results); by default nowhere.
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        super().__init__(distributed=distributed)
        self._evaluations: dict[str, COCOeval_faster] = {}
        self._class_names = list(thing_classes)
        self._json_file = json_file
        self._dataset_id_to_contiguous_id = dict(
            dataset_id_to_contiguous_id or enumerate(range(len(self._class_names)))
        )
        self._results_file = None if results_file is None else Path(results_file)

    @classmethod
    def from_dataset(
        cls,
        dataset_name: str,
        output_folder: str | os.PathLike | None = None,
        *,
        distributed: bool = True,
    ) -> "InstanceAPEvaluator":
        """The evaluator of a registered dataset, from its metadata; where there is a folder, it
        writes ``coco_instances_results.json`` there."""
        return cls(
            **cls.dataset_arguments(MetadataCatalog.get(dataset_name)),
            results_file=None if output_folder is None else Path(output_folder, RESULTS_NAME),
            distributed=distributed,
        )

    @classmethod
    def dataset_arguments(cls, metadata: Metadata) -> dict[str, Any]:
        return {
            "thing_classes": metadata.thing_classes,
            # Not by attribute: Detectron2 is given a file made of the panoptic PNGs in its place.
            "json_file": metadata.as_dict().get("json_file"),
            "dataset_id_to_contiguous_id": metadata.thing_dataset_id_to_contiguous_id,
        }

    def evaluate_image(
        self, record: Mapping[str, Any], prediction: Instances, source: str
    ) -> ImageInstances:
        """The predicted and, where they are in a panoptic PNG, the true instances of an image.

        Args:
            record: dataset dict with ``image_id``, ``height`` and ``width`` and, without
                ``json_file``, ``pan_seg_file_name`` and ``segments_info``.
            prediction: ``instances``: with ``pred_boxes``, ``scores``, ``pred_classes`` and, for
                mask AP, ``pred_masks`` (N, H, W).

        Raises:
            UserError: see :func:`instance_annotations`; also a prediction of another size than
                its image or of an unknown category.
        """
        size = record["height"], record["width"]
        check_size(source, prediction.image_size, "its image", size)
        classes = prediction.pred_classes
        if len(classes) and not 0 <= classes.min() <= classes.max() < len(self._class_names):
            raise UserError(
                f"{source} has pred_classes {int(classes.min())}..{int(classes.max())}, but the "
                f"dataset has {len(self._class_names)} thing categories; set "
                "MODEL.ROI_HEADS.NUM_CLASSES"
            )
        masks = None
        if prediction.has("pred_masks"):
            rles = encode_masks(prediction.pred_masks.bool().cpu().numpy())
            masks = [rle["counts"] for rle in rles]
        boxes = prediction.pred_boxes.tensor.float()
        return ImageInstances(
            size=size,
            boxes=BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).cpu().numpy(),
            scores=prediction.scores.float().cpu().numpy(),
            classes=classes.cpu().numpy(),
            masks=masks,
            annotations=None if self._json_file else instance_annotations(record),
        )

    def summarize(self, images: Mapping[tuple[Hashable, str], ImageInstances]) -> Scores:
        """The average precisions over all images, in percent.

        Returns:
            ``{"bbox": {...}, "segm": {...}}``, the second only where masks are predicted, with
            ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` and ``AP-<name>`` for each thing
            category; nan where there is no ground truth and, as in Detectron2, where the model
            predicts nothing at all. Nothing for a dataset without things.

        Raises:
            UserError: ``json_file`` is not what it should be.
        """
        if not self._class_names:
            return {}
        if self._results_file is not None:
            self._write_results(images)
        # Equal scores are ranked by image: in the order of their ids, as in pycocotools.
        by_id = {image_id: image for (image_id, _), image in images.items()}
        tasks = ["bbox"]
        if any(image.masks is not None for image in by_id.values()):
            tasks.append("segm")
        ground_truth = self._ground_truth(by_id)
        if not all("segmentation" in annotation for annotation in ground_truth.anns.values()):
            logger.warning(f"{self._json_file} has no masks: AP of boxes alone")
            tasks = ["bbox"]
        scores, self._evaluations = {}, {}
        for task in tasks:
            detections = _detections(by_id.values(), task)
            scores[task] = self._average_precisions(ground_truth, detections, task)
            self._log(task, scores[task], len(by_id))
        return scores

    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """That of ``AP`` of each task."""
        return {
            task: {"AP": interval(partial(_resampled_ap, evaluation), len(self.images), AP_SAMPLES)}
            for task, evaluation in self._evaluations.items()
        }

    def _write_results(self, images: Mapping[tuple[Hashable, str], ImageInstances]) -> None:
        """Write the predictions of all images, image by image."""
        # In a full label space of Detectron2 there are classes that are no thing categories.
        category_ids = {place: k for k, place in self._dataset_id_to_contiguous_id.items()}
        self._results_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._results_file.with_suffix(".json.partial")
        separator = b"["
        with open(unfinished, "wb") as file:
            for (image_id, _), image in images.items():
                for result in coco_results(image_id, image, category_ids):
                    file.write(separator + msgspec.json.encode(result))
                    separator = b",\n"
            file.write(b"[]" if separator == b"[" else b"]")
        unfinished.replace(self._results_file)
        logger.info(f"Predicted instances written to {self._results_file}")

    def _ground_truth(self, images: Mapping[Hashable, ImageInstances]) -> COCO:
        """Images are numbered from 1 (faster-coco-eval wants integers), categories too."""
        if self._json_file is not None:
            annotations = self._read_json(images)
        else:
            annotations = {image_id: image.annotations for image_id, image in images.items()}
        numbered = [
            {**annotation, "image_id": number, "category_id": annotation["category_id"] + 1}
            for number, image_id in enumerate(images, 1)
            for annotation in annotations.get(image_id, ())
        ]
        return COCO(
            {
                "images": [
                    {"id": number, "height": image.size[0], "width": image.size[1]}
                    for number, image in enumerate(images.values(), 1)
                ],
                "annotations": [
                    {"iscrowd": 0, **annotation, "id": number}
                    for number, annotation in enumerate(numbered, 1)
                ],
                "categories": [
                    {"id": number, "name": name} for number, name in enumerate(self._class_names, 1)
                ],
            }
        )

    def _read_json(
        self, images: Mapping[Hashable, ImageInstances]
    ) -> dict[Hashable, list[dict[str, Any]]]:
        """The annotations in ``json_file`` of some images, category ids contiguous."""
        source, to_contiguous = self._json_file, self._dataset_id_to_contiguous_id
        content = read_json(source)
        sizes = {
            image_id: {"height": image.size[0], "width": image.size[1]}
            for image_id, image in images.items()
        }
        names = {k: self._class_names[place] for k, place in to_contiguous.items()}
        raise_first(instances_faults(content, source=source, things=names, images=sizes))
        annotations: dict[Hashable, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        without_area = 0
        for annotation in content["annotations"]:
            if annotation["image_id"] not in annotations:
                continue
            annotation = dict(annotation)
            mask = annotation.pop("segmentation", None)
            if isinstance(mask, list) and mask:
                mask = [*filter(is_polygon, mask)]
                if not mask:  # as where the records are loaded, which says so
                    continue
            image_id = annotation["image_id"]
            instance = {**annotation, "category_id": to_contiguous[annotation["category_id"]]}
            if mask:
                instance["segmentation"] = mask
            if "area" not in annotation:
                instance["area"] = _area(instance, sizes[image_id])
                without_area += 1
            annotations[image_id].append(instance)
        if without_area:
            logger.info(f"{source}: {without_area} annotations say no area; their masks' is taken")
        return annotations

    def _average_precisions(
        self, ground_truth: COCO, detections: list[dict[str, Any]], task: str
    ) -> dict[str, float]:
        keys = [*METRICS, *(f"AP-{name}" for name in self._class_names)]
        if not detections:
            logger.warning(f"No instances were predicted, so the {task} metrics are nan")
            return dict.fromkeys(keys, math.nan)
        evaluation = COCOeval_faster(
            ground_truth,
            ground_truth.loadRes(detections),
            task,
            print_function=logger.debug,
            separate_eval=True,
        )
        evaluation.run()
        self._evaluations[task] = evaluation
        # IoU threshold, recall, category, area range, detections an image; -1 is none
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        values = [
            *evaluation.stats[: len(METRICS)],
            *(precision[:, :, k].reshape(-1).mean() for k in range(len(self._class_names))),
        ]
        return {
            key: 100 * float(value) if value >= 0 else math.nan
            for key, value in zip(keys, values, strict=True)
        }

    def _log(self, task: str, result: Mapping[str, float], num_images: int) -> None:
        logger.info(
            f"Evaluation results for {task} on {num_images} images:\n"
            + create_small_table({metric: result[metric] for metric in METRICS})
        )
        columns = min(3, len(self._class_names))
        cells = [cell for name in self._class_names for cell in (name, result[f"AP-{name}"])]
        rows = [cells[i : i + 2 * columns] for i in range(0, len(cells), 2 * columns)]
        logger.info(f"Per-category {task} AP:\n" + pipe_table(["category", "AP"] * columns, rows))


def _resampled_ap(evaluation: COCOeval_faster, weights: np.ndarray) -> np.ndarray:
    """AP in percent, (B,), of images that are there as many times as ``weights`` (B, I) says."""
    params = copy.deepcopy(evaluation.params)
    number, areas = weights.shape[1], len(params.areaRng)
    # What faster-coco-eval keeps of a category, an area range and an image; no way to ask for it.
    kept = evaluation._evalImgs_cpp
    starts = [k * areas * number for k in range(len(params.catIds))]
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    params.maxDets = params.maxDets[-1:]
    values = []
    for row in weights:
        chosen = np.repeat(np.arange(number), row.astype(int)).tolist()
        images = [kept[start + image] for start in starts for image in chosen]
        precision = np.asarray(accumulate(params, images)["precision"])
        found = precision[precision >= 0]
        values.append(100 * float(found.mean()) if found.size else math.nan)
    return np.array(values)


def _area(annotation: Mapping[str, Any], size: Mapping[str, int]) -> float:
    """The area of an annotation that does not say it: its mask's or, without one, its box's."""
    mask = annotation.get("segmentation")
    if not mask:
        return annotation["bbox"][2] * annotation["bbox"][3]
    if isinstance(mask, list) or isinstance(mask["counts"], list):
        mask = mask_util.frPyObjects(mask, size["height"], size["width"])
    return float(mask_util.area(mask_util.merge(mask) if isinstance(mask, list) else mask))


def coco_results(
    image_id: Hashable, image: ImageInstances, category_ids: Mapping[int, int]
) -> Iterator[dict[str, Any]]:
    """The predictions of an image in the COCO result format, with Detectron2's fields."""
    masks = image.masks or [None] * len(image.scores)
    columns = (image.boxes, image.scores, image.classes)
    for box, score, place, counts in zip(*(c.tolist() for c in columns), masks, strict=True):
        if place in category_ids:
            result = {"image_id": image_id, "category_id": category_ids[place]}
            result |= {"bbox": box, "score": score}
            if counts is not None:
                mask = {"size": list(image.size), "counts": counts.decode()}
                result["segmentation"] = mask
            yield result


def _detections(images: Iterable[ImageInstances], task: str) -> list[dict[str, Any]]:
    """The predictions in the COCO result format, images and categories numbered from 1.

    One task at a time: beside boxes, masks would be sorted by the area of the boxes.
    """
    detections = []
    for number, image in enumerate(images, 1):
        if task == "segm":
            size = list(image.size)
            shapes = [
                {"segmentation": {"size": size, "counts": counts}} for counts in image.masks or ()
            ]
        else:
            shapes = [{"bbox": box} for box in image.boxes.tolist()]
        categories = (image.classes + 1).tolist()
        for shape, category, score in zip(shapes, categories, image.scores.tolist(), strict=True):
            detections.append(
                {"image_id": number, "category_id": category, "score": score, **shape}
            )
    return detections
