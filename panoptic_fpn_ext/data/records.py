"""The records of a dataset, from its JSON files.

Those of COCO have half a gigabyte. They are decoded and checked in one go, entry by entry, by
:mod:`~panoptic_fpn_ext.data.coco_types`; what these do not take is read once more with the rules
of :mod:`~panoptic_fpn_ext.data.coco_json`, which say what is wrong.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from typing import Any, TypeVar

import msgspec
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode
from pycocotools import mask as rle

from ..errors import UserError
from .coco_json import (
    images_faults,
    instances_faults,
    is_polygon,
    other_name,
    panoptic_faults,
    raise_first,
    read_bytes,
    read_json,
    without_gc,
)
from .coco_types import Annotation, Categories, Content, Image, Instance, WithId
from .label_space import dataset_ids, thing_sem_seg_ids
from .rle_counts import counts_fault
from .virtual_files import sem_seg_file_name

logger = logging.getLogger(__name__)

T = TypeVar("T")
Records = list[dict[str, Any]]


def read_categories(panoptic_json: str | os.PathLike) -> Any:
    """The ``categories`` of a panoptic JSON, whatever they are; None where it has none.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """

    def exactly() -> Any:
        content = read_json(panoptic_json)
        return content.get("categories") if isinstance(content, dict) else None

    return _first(lambda: _decode(panoptic_json, Categories).categories, exactly)


def load_panoptic_dataset(name: str) -> Records:
    """The records of a dataset of ``register_panoptic_dataset``.

    Returns:
        Dicts of Detectron2's dataset format with ``file_name``, ``image_id``, ``height``,
        ``width``, ``pan_seg_file_name``, ``segments_info`` (category ids contiguous),
        ``sem_seg_file_name`` (for Detectron2, see :mod:`~panoptic_fpn_ext.data.virtual_files`) and,
        where the dataset has things and an instances JSON, ``annotations``. Images without an
        annotation are left out. Of a dataset without annotations the first four.

    Raises:
        UserError: the first fault in either JSON.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("panoptic_root") is None:
        return _records_without_annotations(metadata)
    source = metadata.panoptic_json
    things = metadata.thing_dataset_id_to_contiguous_id

    def quickly() -> Records:
        content = _decode(source, Content)
        _check_categories(content.categories, metadata)
        images = map(partial(_decode_whole, kind=Image), content.images)
        annotations = map(partial(_decode_whole, kind=Annotation), content.annotations)
        return _records(images, annotations, metadata)

    def exactly() -> Records:
        content = read_json(source)
        if isinstance(content, dict):
            _check_categories(content.get("categories"), metadata)
        raise_first(panoptic_faults(content, source=source, category_ids=dataset_ids(metadata)))
        return _records(content["images"], content["annotations"], metadata)

    with without_gc():
        records = _first(quickly, exactly)
        if "json_file" in metadata.as_dict():
            annotations = load_instances(
                metadata.json_file,
                thing_ids=things,
                thing_classes=metadata.thing_classes,
                images={r["image_id"]: r for r in records},
            )
            for record in records if things else ():
                record["annotations"] = annotations[record["image_id"]]
    return records


def _records_without_annotations(metadata: Metadata) -> Records:
    source = metadata.panoptic_json
    content = read_json(source)
    raise_first(images_faults(content, source=source))
    _check_categories(content.get("categories"), metadata)
    return [
        {"file_name": path, "image_id": image_id, "height": height, "width": width}
        for image_id, (path, height, width) in _images(content["images"], metadata).items()
    ]


def load_instances(
    instances_json: str,
    *,
    thing_ids: Mapping[int, int],
    thing_classes: Sequence[str],
    images: Mapping[Hashable, dict[str, Any]],
) -> dict[Hashable, list[dict[str, Any]]]:
    """Instance annotations by image id, as Detectron2's ``load_coco_json`` has them.

    Args:
        instances_json: annotations in the format of COCO instances.
        thing_ids: from the category ids of the JSON to contiguous ones.
        thing_classes: the names of these.
        images: the images to load, dicts with ``height`` and ``width``, by id.

    Raises:
        UserError: the first fault in the JSON.
    """
    names = {number: thing_classes[place] for number, place in thing_ids.items()}

    def quickly() -> dict[Hashable, list[dict[str, Any]]]:
        content = _decode(instances_json, Content)
        for category in content.categories if isinstance(content.categories, list) else ():
            _expect(other_name(category, names) is None, "another name")
        known = {image.id for image in map(_decoder(WithId), content.images)}
        if known.isdisjoint(images):
            raise msgspec.ValidationError("none of the images")
        annotations = map(_decoder(Instance), content.annotations)
        return _instances(annotations, known, thing_ids, images, instances_json)

    def exactly() -> dict[Hashable, list[dict[str, Any]]]:
        content = read_json(instances_json)
        faults = instances_faults(content, source=instances_json, things=names, images=images)
        raise_first(faults)
        annotations = (a for a in content["annotations"] if a["image_id"] in images)
        annotations = (msgspec.convert(a, Instance) for a in annotations)
        return _instances(annotations, images, thing_ids, images, instances_json)

    return _first(quickly, exactly)


def check_files(records: Records, name: str) -> None:
    """
    Args:
        records: those of a dataset, of this package or not.
        name: the dataset, for the error.

    Raises:
        UserError: an image or a panoptic PNG is not there.
    """
    paths = [r[key] for r in records for key in ("file_name", "pan_seg_file_name") if key in r]
    # A folder at a time: on shared disks each look at a file takes a while.
    there: dict[str, frozenset[str]] = {}
    missing = []
    for path in paths:
        if "://" in path:
            continue
        folder, file_name = os.path.split(path)
        if folder not in there:
            there[folder] = frozenset(os.listdir(folder or ".") if os.path.isdir(folder) else ())
        if file_name not in there[folder]:
            missing.append(path)
    if missing:
        raise UserError(
            f"dataset {name}: {len(missing)} of {len(paths)} files are missing, first "
            f"{missing[0]}; tools/check_dataset.py lists all faults of a dataset"
        )


def _first(quickly: Callable[[], T], exactly: Callable[[], T]) -> T:
    """What ``quickly`` returns; where it is in doubt, ``exactly``."""
    doubts = (msgspec.MsgspecError, UnicodeError, RecursionError, KeyError)
    with contextlib.suppress(*doubts):
        return quickly()
    return exactly()


def _decoder(kind: type[T]) -> Callable[[bytes], T]:
    return msgspec.json.Decoder(kind).decode


def _decode(path: str | os.PathLike, kind: type[T]) -> T:
    return msgspec.json.decode(read_bytes(path), type=kind)


def _decode_whole(entry: bytes, kind: type) -> dict[str, Any]:
    """An entry with all its fields, those of ``kind`` checked."""
    decoded = msgspec.json.decode(entry)
    msgspec.convert(decoded, kind)
    return decoded


def _records(
    images: Iterable[dict[str, Any]], annotations: Iterable[dict[str, Any]], metadata: Metadata
) -> Records:
    """
    Args:
        images, annotations: entries of a panoptic JSON; segments become part of the records.
        metadata: of the dataset.

    Raises:
        KeyError, msgspec.ValidationError: where entries do not go together.
    """
    things = metadata.thing_dataset_id_to_contiguous_id
    contiguous = dataset_ids(metadata)
    classes_of_things = thing_sem_seg_ids(metadata)
    sizes = _images(images, metadata)
    records = {}
    for annotation in annotations:
        image_id, segments_info = annotation["image_id"], annotation["segments_info"]
        path, height, width = sizes[image_id]
        for info in segments_info:
            category = info["category_id"]
            info.setdefault("iscrowd", 0)
            info["category_id"] = contiguous[category]
            info["isthing"] = category in things
        _expect(image_id not in records, "two annotations of an image")
        ids = {info["id"] for info in segments_info}
        _expect(len(ids) == len(segments_info), "a segment id twice")
        png = os.path.join(metadata.panoptic_root, annotation["file_name"])
        records[image_id] = {
            "file_name": path,
            "image_id": image_id,
            "height": height,
            "width": width,
            "pan_seg_file_name": png,
            "segments_info": segments_info,
            "sem_seg_file_name": sem_seg_file_name(png, segments_info, classes_of_things),
        }
    _expect(bool(records), "no annotations")
    if without := len(sizes) - len(records):
        logger.warning(
            "%s: left out %d images without an annotation", metadata.panoptic_json, without
        )
    return list(records.values())


def _images(
    images: Iterable[dict[str, Any]], metadata: Metadata
) -> dict[Hashable, tuple[str, int, int]]:
    """Path, height and width of each image, by its id."""
    image_file_name = metadata.get("image_file_name", itemgetter("file_name"))
    found = {}
    for image in images:
        path = os.path.join(metadata.image_root, image_file_name(image))
        _expect(image["id"] not in found, "an image id twice")
        found[image["id"]] = path, image["height"], image["width"]
    return found


def _instances(
    annotations: Iterable[Instance],
    known: Container[Hashable],
    thing_ids: Mapping[int, int],
    images: Mapping[Hashable, dict[str, Any]],
    source: str,
) -> dict[Hashable, list[dict[str, Any]]]:
    """The annotations of ``images``, in Detectron2's format, by image.

    Raises:
        KeyError, msgspec.ValidationError: an annotation of an image that is not ``known``, of a
            category that is no thing or with a mask of another size; masks of some and none of
            others; odd keypoints.
    """
    loaded: dict[Hashable, list[dict[str, Any]]] = {image_id: [] for image_id in images}
    short_polygons = 0
    have_masks = set()
    for annotation in _sharing_numbers(annotations):
        image_id = annotation.image_id
        _expect(image_id in known, "not in its images")
        if image_id not in images:
            continue  # the panoptic JSON may hold a part of the images only
        instance = {
            "iscrowd": annotation.iscrowd,
            "bbox": annotation.bbox,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": thing_ids[annotation.category_id],
        }
        mask = annotation.segmentation
        have_masks.add(bool(mask))
        if isinstance(mask, dict):
            size = [images[image_id]["height"], images[image_id]["width"]]
            _expect(mask["size"] == size, "a mask of another size")
            _expect(counts_fault(mask["counts"], math.prod(size)) is None, "odd counts")
            if isinstance(mask["counts"], list):
                mask = rle.frPyObjects(mask, *size)
        elif mask:
            mask = [*filter(is_polygon, mask)]
            if not mask:
                short_polygons += 1
                continue
        if mask:
            instance["segmentation"] = mask
        if annotation.keypoints:
            _expect(len(annotation.keypoints) % 3 == 0, "odd keypoints")
            # COCO gives indices of pixels, Detectron2 wants coordinates.
            instance["keypoints"] = [
                value + 0.5 if k % 3 < 2 else value for k, value in enumerate(annotation.keypoints)
            ]
        loaded[image_id].append(instance)
    _expect(len(have_masks) < 2, "masks of some")
    if short_polygons:
        logger.warning(
            "%s: left out %d instances whose polygons have fewer than 3 points each",
            source,
            short_polygons,
        )
    return loaded


def _sharing_numbers(annotations: Iterable[Instance]) -> Iterator[Instance]:
    """The annotations, with the numbers of their polygons and boxes in memory once for all.

    Of coordinates with two decimals, as COCO has them, there are few; an object for each time that
    one occurs takes a gigabyte. Other numbers stay what they are.
    """
    annotations = iter(annotations)
    objects = (np.arange(4096 * 100) / 100).astype(object)
    while batch := list(islice(annotations, 64)):
        lists = [a.bbox for a in batch]
        for annotation in batch:
            if isinstance(annotation.segmentation, list):
                lists += annotation.segmentation
        values = np.fromiter(chain.from_iterable(lists), np.float64, sum(map(len, lists)))
        places = np.rint(values * 100)
        few = (places >= 0) & (places < len(objects)) & (places / 100 == values)
        shared = objects[np.where(few, places, 0).astype(np.int64)]
        shared[~few] = values[~few]
        numbers = iter(shared.tolist())
        for coordinates in lists:
            coordinates[:] = islice(numbers, len(coordinates))
        yield from batch


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise msgspec.ValidationError(what)


def _check_categories(categories: Any, metadata: Metadata) -> None:
    """Raise UserError if a panoptic JSON has categories its dataset was registered without."""
    known = [*dataset_ids(metadata)]
    for category in categories if isinstance(categories, list) else ():
        if isinstance(category, dict) and category.get("id") not in known:
            raise UserError(
                f"{metadata.panoptic_json}: category {category.get('id')} "
                f"({category.get('name')}) is not one that dataset {metadata.name} was registered "
                f"with; their ids are {', '.join(map(str, sorted(known)))}"
            )
