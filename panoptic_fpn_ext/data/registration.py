"""Registering datasets in the COCO panoptic format (https://cocodataset.org/#format-data).

Nothing is read before it is needed: categories when metadata is first asked for, records when the
dataset is loaded.
"""

import inspect
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode
from pycocotools import mask as rle

from ..errors import UserError
from .coco_json import category_faults, instances_faults, panoptic_faults, raise_first, read_json
from .label_space import thing_sem_seg_ids
from .virtual_files import INSTANCES_PREFIX, sem_seg_file_name

logger = logging.getLogger(__name__)

LABEL_SPACES = ("separated", "full")


def register_panoptic_dataset(
    name: str,
    image_root: str | os.PathLike,
    panoptic_root: str | os.PathLike,
    panoptic_json: str | os.PathLike,
    instances_json: str | os.PathLike | None = None,
    *,
    label_space: str = "separated",
    categories: Sequence[dict[str, Any]] | None = None,
    evaluators: Sequence[str] = ("panoptic_seg", "sem_seg", "instances"),
    **metadata: Any,
) -> None:
    """Register a dataset in the COCO panoptic format with Detectron2's catalogs.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        panoptic_json: the panoptic annotations.
        instances_json: COCO instance annotations of the same images; used for the instance branch
            in place of the panoptic segments.
        label_space: semantic classes. ``"separated"``: class 0 is all things together, then the
            stuff categories (as for COCO). ``"full"``: every category has its own, in the order
            of their ids (as for Cityscapes).
        categories: the ``categories`` of the JSON, where they are known without reading it.
        evaluators: names in ``EVALUATOR_REGISTRY``: what the dataset is evaluated with.
        metadata: anything else to keep in the dataset's metadata. With ``image_file_name``, a
            function, an image's path below ``image_root`` is what that gives for its entry in the
            JSON's ``images``; by default the entry's ``file_name``.

    Raises:
        UserError: a name that is taken, or a label space that does not exist.
    """
    if label_space not in LABEL_SPACES:
        raise UserError(f"dataset {name}: label_space {label_space!r} is not one of {LABEL_SPACES}")

    if name in DatasetCatalog.list():
        raise UserError(f"dataset {name}: another one is registered by this name")

    def load_categories() -> dict[str, Any]:
        entries = categories
        if entries is None:
            content = read_json(panoptic_json)
            entries = content.get("categories") if isinstance(content, dict) else None
        return categories_to_metadata(entries, label_space=label_space, source=str(panoptic_json))

    MetadataCatalog[name] = _LazyMetadata(
        load_categories,
        name=name,
        image_root=str(image_root),
        panoptic_root=str(panoptic_root),
        panoptic_json=str(panoptic_json),
        evaluators=tuple(evaluators),
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **({"json_file": str(instances_json)} if instances_json else {}),
        **metadata,
    )
    DatasetCatalog.register(name, lambda: load_panoptic_dataset(name))


def register_datasets_of_config(cfg: CfgNode) -> None:
    """Register the datasets of ``DATASETS.PANOPTIC`` that are not registered yet.

    Raises:
        UserError: an entry that is not a dict of arguments of :func:`register_panoptic_dataset`.
    """
    known = dict(inspect.signature(register_panoptic_dataset).parameters)
    del known["metadata"]
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    for index, arguments in enumerate(cfg.DATASETS.get("PANOPTIC", ())):
        key = f"DATASETS.PANOPTIC[{index}]"
        if not isinstance(arguments, dict):
            raise UserError(f"{key}: {arguments!r} is not a dict with {', '.join(required)}")
        for name in required:
            if name not in arguments:
                raise UserError(f"{key}: no {name!r}; needed are {', '.join(required)}")
        for name in arguments:
            if name not in known:
                raise UserError(f"{key}: unknown {name!r}; allowed are {', '.join(known)}")
        if arguments["name"] not in DatasetCatalog.list():
            register_panoptic_dataset(**arguments)
            continue
        registered = MetadataCatalog.get(arguments["name"]).as_dict()
        if registered.get("panoptic_json") != arguments["panoptic_json"]:
            raise UserError(
                f"{key}: a dataset named {arguments['name']} is registered already: choose "
                "another name"
            )


def load_panoptic_dataset(name: str) -> list[dict[str, Any]]:
    """The records of a dataset of :func:`register_panoptic_dataset`.

    Returns:
        Dicts of Detectron2's dataset format with ``file_name``, ``image_id``, ``height``,
        ``width``, ``pan_seg_file_name``, ``segments_info`` (category ids contiguous),
        ``sem_seg_file_name`` (for Detectron2, see :mod:`~panoptic_fpn_ext.data.virtual_files`) and,
        where the dataset has an instances JSON, ``annotations``. Images without an annotation are
        left out.

    Raises:
        UserError: the first fault in either JSON.
    """
    metadata = MetadataCatalog.get(name)
    source = metadata.panoptic_json
    content = read_json(source)
    things = metadata.thing_dataset_id_to_contiguous_id
    classes_of_things = thing_sem_seg_ids(metadata)
    stuff = metadata.stuff_dataset_id_to_contiguous_id
    _check_categories(content, metadata)
    raise_first(panoptic_faults(content, source=source, category_ids={*things, *stuff}))
    image_file_name = metadata.get("image_file_name", itemgetter("file_name"))

    def segment(info: dict[str, Any]) -> dict[str, Any]:
        category = info["category_id"]
        isthing = category in things
        contiguous = things[category] if isthing else stuff[category]
        return {"iscrowd": 0, **info, "category_id": contiguous, "isthing": isthing}

    images = {image["id"]: image for image in content["images"]}
    records = []
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        png = os.path.join(metadata.panoptic_root, annotation["file_name"])
        segments_info = [segment(info) for info in annotation["segments_info"]]
        records.append(
            {
                "file_name": os.path.join(metadata.image_root, image_file_name(image)),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": png,
                "segments_info": segments_info,
                "sem_seg_file_name": sem_seg_file_name(png, segments_info, classes_of_things),
            }
        )
    if "json_file" in metadata.as_dict():
        annotations = load_instances(
            metadata.json_file, thing_ids=things, images={r["image_id"]: r for r in records}
        )
        for record in records:
            record["annotations"] = annotations[record["image_id"]]
    return records


def load_instances(
    instances_json: str, *, thing_ids: Mapping[int, int], images: Mapping[Hashable, dict[str, Any]]
) -> dict[Hashable, list[dict[str, Any]]]:
    """Instance annotations by image id, as Detectron2's ``load_coco_json`` has them.

    Args:
        instances_json: annotations in the format of COCO instances.
        thing_ids: from the category ids of the JSON to contiguous ones.
        images: the images to load, dicts with ``height`` and ``width``, by id.

    Raises:
        UserError: the first fault in the JSON.
    """
    content = read_json(instances_json)
    raise_first(
        instances_faults(content, source=instances_json, things=thing_ids.keys(), images=images)
    )
    loaded: dict[Hashable, list[dict[str, Any]]] = {image_id: [] for image_id in images}
    without_mask = 0
    for annotation in content["annotations"]:
        if annotation["image_id"] not in loaded:
            continue
        instance = {
            "iscrowd": annotation.get("iscrowd", 0),
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": thing_ids[annotation["category_id"]],
        }
        mask = annotation.get("segmentation")
        if isinstance(mask, list) and mask:
            mask = [polygon for polygon in mask if len(polygon) % 2 == 0 and len(polygon) >= 6]
            if not mask:
                without_mask += 1
                continue
        elif mask and isinstance(mask["counts"], list):
            mask = rle.frPyObjects(mask, *mask["size"])
        if mask:
            instance["segmentation"] = mask
        if annotation.get("keypoints"):
            # COCO gives indices of pixels, Detectron2 wants coordinates.
            instance["keypoints"] = [
                value + 0.5 if k % 3 < 2 else value
                for k, value in enumerate(annotation["keypoints"])
            ]
        loaded[annotation["image_id"]].append(instance)
    if without_mask:
        logger.warning(
            "%s: left out %d instances whose polygons have fewer than 3 points each",
            instances_json,
            without_mask,
        )
    return loaded


def categories_to_metadata(
    categories: Sequence[dict[str, Any]], *, label_space: str, source: str
) -> dict[str, Any]:
    """Detectron2 metadata (class names, colours, id maps) of COCO panoptic categories.

    Args:
        categories: dicts with ``id``, ``name``, ``isthing`` and, optionally, ``color``.
        label_space: see :func:`register_panoptic_dataset`.
        source: the file they come from, for error messages.

    Raises:
        UserError: the first fault in the categories.
    """
    raise_first(category_faults(categories, source=source))
    # By id, as Detectron2 and pycocotools order them.
    categories = sorted(categories, key=lambda category: category["id"])
    things = [c for c in categories if c["isthing"]]
    stuff = [c for c in categories if not c["isthing"]]
    if label_space == "full":
        sem_seg = categories
    elif things:
        sem_seg = [{"id": 0, "name": "things", "color": [82, 18, 128]}, *stuff]
        if any(c["id"] == 0 for c in stuff):
            sem_seg[0]["id"] = -1
    else:
        sem_seg = stuff
    sem_seg_ids = {c["id"]: i for i, c in enumerate(sem_seg)}
    return {
        "thing_classes": [c["name"] for c in things],
        "thing_colors": [_color(c) for c in things],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "stuff_classes": [c["name"] for c in sem_seg],
        "stuff_colors": [_color(c) for c in sem_seg],
        "stuff_dataset_id_to_contiguous_id": sem_seg_ids,
        "thing_sem_seg_ids": tuple(
            sem_seg_ids[c["id"]] if label_space == "full" else 0 for c in things
        ),
    }


def _check_categories(content: Any, metadata: Metadata) -> None:
    """Raise UserError if a panoptic JSON has categories its dataset was registered without."""
    known = {
        *metadata.thing_dataset_id_to_contiguous_id,
        *metadata.stuff_dataset_id_to_contiguous_id,
    }
    categories = content.get("categories") if isinstance(content, dict) else None
    for category in categories if isinstance(categories, list) else ():
        if isinstance(category, dict) and category.get("id") not in known:
            raise UserError(
                f"{metadata.panoptic_json}: category {category.get('id')} "
                f"({category.get('name')}) is not one that dataset {metadata.name} was registered "
                f"with; their ids are {', '.join(map(str, sorted(known)))}"
            )


class _LazyMetadata(Metadata):
    """Metadata whose class names, colours and id maps are loaded when first asked for.

    Without an instances JSON ``json_file``, by which Detectron2's COCOEvaluator finds it, is the
    name of one made of the panoptic PNGs; it is not in :meth:`as_dict`.
    """

    def __init__(self, load: Callable[[], dict[str, Any]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.__dict__["_load"] = load

    def __getattr__(self, key: str) -> Any:
        if key == "json_file":
            return f"{INSTANCES_PREFIX}{self.name}"
        load = self.__dict__.pop("_load", None)
        if load is None or key.startswith("__"):
            return super().__getattr__(key)
        try:
            self.set(**load())
        except BaseException:
            self.__dict__["_load"] = load
            raise
        return getattr(self, key)

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().as_dict().items() if k != "_load"}


def _color(category: dict[str, Any]) -> list[int]:
    """The category's colour (R, G, B), or else one made from its id, always the same."""
    if "color" in category:
        return list(category["color"])
    return [(category["id"] * step) % 256 for step in (37, 101, 197)]
