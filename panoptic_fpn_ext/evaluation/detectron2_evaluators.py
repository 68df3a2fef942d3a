"""Detectron2's own evaluators, on datasets whose ground truth is in panoptic PNGs.

They take the model's outputs as they are. What two of them want of a dataset is made from its
panoptic PNGs: a file of labels for each image, a JSON file of instance annotations.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    SemSegEvaluator,
)
from PIL import Image

from ..data.targets import sem_seg_from_panoptic
from .instance_ap import instance_annotations
from .panoptic_maps import read_ground_truth
from .registry import DETECTRON2_EVALUATOR_REGISTRY, needs


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs(
    "panoptic_seg",
    module="panopticapi",
    install="pip install git+https://github.com/cocodataset/panopticapi.git",
)
def panoptic_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return COCOPanopticEvaluator(dataset_name, output_folder)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("sem_seg")
def sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    if all("sem_seg_file_name" in record for record in DatasetCatalog.get(dataset_name)):
        return SemSegEvaluator(dataset_name, output_dir=output_folder)
    return PanopticPNGSemSegEvaluator(dataset_name, output_folder)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("instances")
def instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    # Whoever wants Detectron2's numbers wants those of pycocotools, not of its "fast" variant,
    # which moreover takes no image ids but integers.
    arguments = {"output_dir": output_folder, "use_fast_impl": False}
    if "json_file" in MetadataCatalog.get(dataset_name).as_dict():
        return COCOEvaluator(dataset_name, **arguments)
    # Read by the constructor alone. Every process makes its own, so that machines share nothing.
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(instances_json(dataset_name), file)
        file.flush()
        with _registered_as(dataset_name, json_file=file.name) as name:
            return COCOEvaluator(name, **arguments)


# In one process, or several on one machine.


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("sem_seg")
def cityscapes_sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(dataset_name)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("instances")
def cityscapes_instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(dataset_name)


class PanopticPNGSemSegEvaluator(SemSegEvaluator):
    """SemSegEvaluator, given the labels of an image in a temporary file while it reads them."""

    def __init__(self, dataset_name: str, output_folder: str) -> None:
        """
        Args:
            dataset_name: a dataset whose records have ``pan_seg_file_name`` and ``segments_info``.
            output_folder: where it writes the predictions and its scores.
        """
        records = [
            {**record, "sem_seg_file_name": ""} for record in DatasetCatalog.get(dataset_name)
        ]
        with _registered_as(dataset_name, records) as name:
            super().__init__(name, output_dir=output_folder)
        metadata = MetadataCatalog.get(dataset_name)
        self._thing_sem_seg_ids = metadata.thing_sem_seg_ids

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """See :class:`SemSegEvaluator`; the inputs are dataset dicts."""
        for record, output in zip(inputs, outputs, strict=True):
            labels = sem_seg_from_panoptic(
                read_ground_truth(record["pan_seg_file_name"]),
                record["segments_info"],
                thing_sem_seg_ids=self._thing_sem_seg_ids,
                ignore_label=self._ignore_label,
                source=record["pan_seg_file_name"],
            )
            with tempfile.NamedTemporaryFile(suffix=".png") as file:
                Image.fromarray(labels).save(file, compress_level=1)
                file.flush()
                self.input_file_to_gt_file[record["file_name"]] = file.name
                super().process([record], [output])


def instances_json(dataset_name: str) -> dict[str, Any]:
    """The things of a dataset's panoptic PNGs as COCO instance annotations, with its own ids."""
    metadata = MetadataCatalog.get(dataset_name)
    category_ids = list(metadata.thing_dataset_id_to_contiguous_id)
    images, annotations = [], []
    for record in DatasetCatalog.get(dataset_name):
        images.append({key: record[key] for key in ("height", "width", "file_name")})
        images[-1]["id"] = record["image_id"]
        for annotation in instance_annotations(record):
            annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"].decode()
            annotation["category_id"] = category_ids[annotation["category_id"]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": record["image_id"], **annotation}
            )
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(category_ids, metadata.thing_classes, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


@contextlib.contextmanager
def _registered_as(
    dataset_name: str, records: list[dict[str, Any]] | None = None, **metadata: Any
) -> Iterator[str]:
    """Another name for a dataset, with other records or metadata, while a constructor reads it."""
    name = f"{dataset_name} for Detectron2"
    original = MetadataCatalog.get(dataset_name)
    _ = original.thing_classes  # what is lazy is loaded now
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**{**original.as_dict(), "name": name, **metadata})
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
