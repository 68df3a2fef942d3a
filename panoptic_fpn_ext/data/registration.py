"""Registering datasets in the COCO panoptic format (https://cocodataset.org/#format-data).

Nothing is read before it is needed: categories when metadata is first asked for, records when the
dataset is loaded.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json

from ..errors import UserError

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
    evaluators: Sequence[str] | None = None,
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
        evaluators: names in ``EVALUATOR_REGISTRY``: what the dataset is evaluated with. By
            default all of them, ``"instances"`` only with an ``instances_json``.
        metadata: anything else to keep in the dataset's metadata.
    """
    if label_space not in LABEL_SPACES:
        raise UserError(f"dataset {name}: label_space {label_space!r} is not one of {LABEL_SPACES}")

    if evaluators is None:
        evaluators = ("panoptic_seg", "sem_seg", *(["instances"] if instances_json else []))

    def load_categories() -> dict[str, Any]:
        found = categories if categories is not None else _read_json(panoptic_json)["categories"]
        return categories_to_metadata(found, label_space=label_space, source=str(panoptic_json))

    MetadataCatalog[name] = _LazyMetadata(
        load_categories,
        name=name,
        image_root=str(image_root),
        panoptic_root=str(panoptic_root),
        panoptic_json=str(panoptic_json),
        evaluators=tuple(evaluators),
        evaluator_type="panoptic_fpn_ext",
        ignore_label=255,
        label_divisor=1000,
        **({"json_file": str(instances_json)} if instances_json else {}),
        **metadata,
    )
    DatasetCatalog.register(name, lambda: load_panoptic_dataset(name))


def load_panoptic_dataset(name: str) -> list[dict[str, Any]]:
    """The records of a dataset of :func:`register_panoptic_dataset`.

    Returns:
        Dicts of Detectron2's dataset format with ``file_name``, ``image_id``, ``height``,
        ``width``, ``pan_seg_file_name``, ``segments_info`` (category ids contiguous) and, where
        the dataset has an instances JSON, ``annotations``.
    """
    metadata = MetadataCatalog.get(name)
    source = metadata.panoptic_json
    content = _read_json(source)
    things = metadata.thing_dataset_id_to_contiguous_id
    stuff = metadata.stuff_dataset_id_to_contiguous_id

    def segment(info: dict[str, Any], image_id: Any) -> dict[str, Any]:
        category = info.get("category_id")
        isthing = category in things
        if not isthing and category not in stuff:
            raise UserError(
                f"{source}: image {image_id}: segment {info.get('id')} has category_id {category}, "
                "which is not among the categories"
            )
        contiguous = things[category] if isthing else stuff[category]
        return {"iscrowd": 0, **info, "category_id": contiguous, "isthing": isthing}

    try:
        images = {image["id"]: image for image in content["images"]}
        records = []
        for annotation in content["annotations"]:
            image_id = annotation["image_id"]
            image = images[image_id]
            records.append(
                {
                    "file_name": os.path.join(metadata.image_root, image["file_name"]),
                    "image_id": image_id,
                    "height": image["height"],
                    "width": image["width"],
                    "pan_seg_file_name": os.path.join(
                        metadata.panoptic_root, annotation["file_name"]
                    ),
                    "segments_info": [segment(s, image_id) for s in annotation["segments_info"]],
                }
            )
    except KeyError as error:
        raise UserError(f"{source}: no {error} where the COCO panoptic format has one") from error
    if not records:
        raise UserError(f"{source}: no annotations")
    if "json_file" in metadata.as_dict():
        _add_instances(records, metadata)
    return records


def categories_to_metadata(
    categories: Sequence[dict[str, Any]], *, label_space: str, source: str
) -> dict[str, Any]:
    """Detectron2 metadata (class names, colours, id maps) of COCO panoptic categories.

    Args:
        categories: dicts with ``id``, ``name``, ``isthing`` and, where there is one, ``color``.
        label_space: see :func:`register_panoptic_dataset`.
        source: the file they come from, for errors.
    """
    for category in categories:
        for field in ("id", "name", "isthing"):
            if field not in category:
                raise UserError(f"{source}: category {category} has no field {field!r}")
    ids = [c["id"] for c in categories]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"{source}: two categories have the id {twice}")

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


class _LazyMetadata(Metadata):
    """Metadata whose class names, colours and id maps are loaded when first asked for."""

    def __init__(self, load: Callable[[], dict[str, Any]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.__dict__["_load"] = load

    def __getattr__(self, key: str) -> Any:
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


def _add_instances(records: list[dict[str, Any]], metadata: Metadata) -> None:
    """Add the instance annotations of ``metadata.json_file`` to the records, in place."""
    if not Path(metadata.json_file).is_file():
        raise UserError(f"dataset {metadata.name}: no such file {metadata.json_file}")
    to_contiguous = metadata.thing_dataset_id_to_contiguous_id
    # Without a dataset name, load_coco_json leaves metadata and category ids alone.
    with_instances = load_coco_json(metadata.json_file, metadata.image_root)
    annotations = {r["image_id"]: r["annotations"] for r in with_instances}
    for record in records:
        record["annotations"] = annotations.get(record["image_id"], [])
        for annotation in record["annotations"]:
            if annotation["category_id"] not in to_contiguous:
                raise UserError(
                    f"{metadata.json_file}: image {record['image_id']}: category_id "
                    f"{annotation['category_id']} is not a thing category of "
                    f"{metadata.panoptic_json}"
                )
            annotation["category_id"] = to_contiguous[annotation["category_id"]]


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error


def _color(category: dict[str, Any]) -> list[int]:
    """The category's colour; where it has none, one made from its id, the same each time."""
    if "color" in category:
        return list(category["color"])
    return [(category["id"] * step) % 256 for step in (37, 101, 197)]
