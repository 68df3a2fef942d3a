"""Detectron2's own evaluators, which take the model's outputs as they are.

The semantic maps that they want of a dataset, and the JSON of instances where it has none, are made
from its panoptic PNGs when they are opened (:mod:`~panoptic_fpn_ext.data.virtual_files`).
"""

import json
import tempfile
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathHandler, PathManager

from ..data.virtual_files import INSTANCES_PREFIX
from ..errors import UserError
from .instance_ap import instance_annotations
from .registry import DETECTRON2_EVALUATOR_REGISTRY, needs
from .score_names import (
    CITYSCAPES_INSTANCE_SCORES,
    CITYSCAPES_SEM_SEG_SCORES,
    INSTANCE_SCORES,
    PANOPTIC_SCORES,
    SEM_SEG_SCORES,
)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs(
    "panoptic_seg",
    scores=PANOPTIC_SCORES,
    module="panopticapi",
    install="pip install git+https://github.com/cocodataset/panopticapi.git",
)
def panoptic_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return COCOPanopticEvaluator(dataset_name, output_folder)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("sem_seg", scores=SEM_SEG_SCORES)
def sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    if any("sem_seg_file_name" not in record for record in DatasetCatalog.get(dataset_name)):
        raise _lacks(dataset_name, "sem_seg_file_name", "SemSegEvaluator")
    return SemSegEvaluator(dataset_name, output_dir=output_folder)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("instances", scores=INSTANCE_SCORES)
def instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    if not hasattr(MetadataCatalog.get(dataset_name), "json_file"):
        raise _lacks(dataset_name, "json_file", "COCOEvaluator")
    # Whoever wants Detectron2's numbers wants those of pycocotools, not of its "fast" variant,
    # which moreover takes no image ids but integers.
    return COCOEvaluator(dataset_name, output_dir=output_folder, use_fast_impl=False)


def _lacks(dataset_name: str, what: str, evaluator: str) -> UserError:
    return UserError(
        f"dataset {dataset_name!r} has no {what}, which Detectron2's {evaluator} reads: choose "
        "TEST.EVALUATORS panoptic_fpn_ext, which needs none"
    )


# In one process, or several on one machine. They run cityscapesscripts, which calls what NumPy 2.4
# no longer has.
_OLD_NUMPY = {"module": "numpy", "attribute": "in1d", "install": "pip install 'numpy<2.4'"}


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("sem_seg", scores=CITYSCAPES_SEM_SEG_SCORES, **_OLD_NUMPY)
def cityscapes_sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(dataset_name)


@DETECTRON2_EVALUATOR_REGISTRY.register()
@needs("instances", scores=CITYSCAPES_INSTANCE_SCORES, **_OLD_NUMPY)
def cityscapes_instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(dataset_name)


class InstancesHandler(PathHandler):
    """Opens ``panoptic-instances://<dataset>``: the JSON file of :func:`instances_json`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [INSTANCES_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        # Every process makes its own, so that machines share nothing. It stays until the next is
        # made or the process ends.
        self._file = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115
        json.dump(instances_json(path.removeprefix(INSTANCES_PREFIX)), self._file)
        self._file.flush()
        return self._file.name

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(InstancesHandler())


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
