"""The two JSON formats of COCO, panoptic and instances: reading them, and what can be wrong.

The formats: https://cocodataset.org/#format-data. Registration stops at the first fault,
:mod:`~panoptic_fpn_ext.data.checks` lists them all.
"""

import gc
import json
import os
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .coco_types import (
    MAX_SEGMENT_ID,
    RLE,
    Box,
    Color,
    Flag,
    Id,
    Name,
    Number,
    Polygons,
    SegmentId,
    Size,
)
from .rle_counts import counts_fault

MAX_CATEGORIES = 254  # one byte, less 255 for void and class 0, "things"


@dataclass(frozen=True)
class Fault:
    """Something wrong in a dataset.

    ``kind`` is a short fixed name; ``image_id`` and ``segment_id`` are those of the JSON, where
    the fault lies in one of them; ``message`` says what was found and what was expected.
    """

    kind: str
    file: str
    message: str
    image_id: Hashable = None
    segment_id: Any = None

    def __str__(self) -> str:
        location = [] if self.image_id is None else [f"image {self.image_id}"]
        location += [] if self.segment_id is None else [f"segment {self.segment_id}"]
        return ": ".join([self.file, *location, self.message]).replace("\n", "\\n")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    data = read_bytes(path)
    try:
        with without_gc():
            return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file, or cut off ({error})") from error


def read_bytes(path: str | os.PathLike) -> bytes:
    try:
        with PathManager.open(str(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


@contextmanager
def without_gc() -> Iterator[None]:
    """Without looking for cycles among new objects, which takes longer than reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # makes the new ones old, without a look at each
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


Rules = dict[str, tuple[Any, str]]
"""For each field of an entry its type, as msgspec has them, and in words what it should be."""

_id = (Id, "an integer or a string")
_integer = (int, "an integer")
_size = (Size, "a positive integer")
_name = (Name, "a non-empty string")
_flag = (Flag, "0 or 1")
_color = (Color, "three integers from 0 to 255")
_box = (Box, "[x, y, w, h]")
_list = (list, "a list")
_segment_id = (SegmentId, f"an integer from 1 to {MAX_SEGMENT_ID} (0 is void)")
_mask = (list | RLE, "a list of polygons or an RLE")
_keypoints = (list[Number], "[x, y, visibility, x, y, ...]")

_CATEGORY: Rules = {"id": _integer, "name": _name, "isthing": _flag}
_IMAGE: Rules = {"id": _id, "file_name": _name, "height": _size, "width": _size}
_ANNOTATION: Rules = {"image_id": _id, "file_name": _name, "segments_info": _list}
_SEGMENT: Rules = {"id": _segment_id, "category_id": _integer}
_INSTANCE: Rules = {"image_id": _id, "category_id": _integer, "bbox": _box}


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as msgspec has them."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError):  # the latter at half a surrogate pair
        return False
    return True


def _broken_rules(
    entry: Any, required: Rules, optional: Rules | None = None
) -> Iterator[tuple[str, str]]:
    """Kind and message of everything in an entry that is not as the rules say."""
    if not isinstance(entry, dict):
        yield "wrong-type", f"{_short(entry)} is not an object with fields"
        return
    for field, (kind, wanted) in required.items():
        if field not in entry:
            yield "missing-field", f"no field {field!r}"
        elif not is_of(entry[field], kind):
            yield "wrong-value", f"{field} is {_short(entry[field])}, expected {wanted}"
    for field, (kind, wanted) in (optional or {}).items():
        if field in entry and not is_of(entry[field], kind):
            yield "wrong-value", f"{field} is {_short(entry[field])}, expected {wanted}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def category_faults(categories: Any, *, source: str) -> Iterator[Fault]:
    """What is wrong in the ``categories`` of a panoptic JSON.

    Args:
        categories: as read.
        source: the file, for the faults.
    """
    if not isinstance(categories, (list, tuple)) or not categories:
        yield Fault("missing-field", source, "no categories, or an empty list of them")
        return
    if len(categories) > MAX_CATEGORIES:
        message = f"{len(categories)} categories, at most {MAX_CATEGORIES} are supported"
        yield Fault("too-many", source, message)
    ids, names = {}, {}
    for index, category in enumerate(categories):
        broken = False
        for kind, message in _broken_rules(category, _CATEGORY, {"color": _color}):
            broken = True
            yield Fault(kind, source, f"categories[{index}]: {message}")
        if broken:
            continue
        for seen, field in ((ids, "id"), (names, "name")):
            value = category[field]
            if value in seen:
                message = f"categories[{seen[value]}] and [{index}] have the same {field} {value!r}"
                yield Fault(f"duplicate-category-{field}", source, message)
            seen.setdefault(value, index)


def panoptic_faults(
    content: Any, *, source: str, category_ids: Collection[int] | None = None
) -> Iterator[Fault]:
    """What is wrong in a panoptic JSON, seen without the images.

    Args:
        content: the JSON, as read.
        source: the file, for the faults.
        category_ids: the ids of the categories where they are not those of the JSON; its own are
            not looked at then.
    """
    lists = {"images": _list, "annotations": _list}
    broken = list(_broken_rules(content, lists))
    yield from (Fault(kind, source, message) for kind, message in broken)
    if broken:
        return
    if category_ids is None:
        yield from category_faults(content.get("categories"), source=source)
        listed = content.get("categories")
        listed = listed if isinstance(listed, list) else []
        category_ids = [c["id"] for c in listed if isinstance(c, dict) and is_of(c.get("id"), int)]
    category_ids = set(category_ids)

    yield from images_faults(content, source=source)
    ids = (image.get("id") for image in content["images"] if isinstance(image, dict))
    images = {image_id for image_id in ids if isinstance(image_id, Hashable)}
    if not content["annotations"]:
        yield Fault("empty", source, "annotations is an empty list: no image to train or test on")
    annotated = set()
    for index, annotation in enumerate(content["annotations"]):
        broken = False
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        for kind, message in _broken_rules(annotation, _ANNOTATION):
            broken = True
            yield Fault(kind, source, f"annotations[{index}]: {message}", image_id)
        if broken:
            continue
        if image_id not in images:
            yield Fault("unknown-image", source, f"annotations[{index}]: not in images", image_id)
        if image_id in annotated:
            yield Fault("duplicate-annotation", source, "has two annotations", image_id)
        annotated.add(image_id)
        yield from _segment_faults(annotation["segments_info"], image_id, category_ids, source)


def images_faults(content: Any, *, source: str) -> Iterator[Fault]:
    """What is wrong in the ``images`` of either JSON, or of one that has nothing else.

    Args:
        content: the JSON, as read.
        source: the file, for the faults.
    """
    broken = list(_broken_rules(content, {"images": _list}))
    yield from (Fault(kind, source, message) for kind, message in broken)
    if broken:
        return
    if not content["images"]:
        yield Fault("empty", source, "images is an empty list")
    seen = set()
    for index, image in enumerate(content["images"]):
        image_id = image.get("id") if isinstance(image, dict) else None
        for kind, message in _broken_rules(image, _IMAGE):
            yield Fault(kind, source, f"images[{index}]: {message}", image_id)
        if not isinstance(image_id, Hashable) or image_id is None:
            continue
        if image_id in seen:
            yield Fault("duplicate-image", source, "two images have this id", image_id)
        seen.add(image_id)


def _segment_faults(
    segments: list[Any], image_id: Hashable, category_ids: Collection[int], source: str
) -> Iterator[Fault]:
    seen = set()
    for index, segment in enumerate(segments):
        segment_id = segment.get("id") if isinstance(segment, dict) else None
        broken = False
        for kind, message in _broken_rules(segment, _SEGMENT, {"iscrowd": _flag}):
            broken = True
            message = f"segments_info[{index}]: {message}"
            yield Fault(kind, source, message, image_id, segment_id)
        if broken:
            continue
        category = segment["category_id"]
        if category not in category_ids:
            message = f"category_id {category} is not among the categories"
            yield Fault("unknown-category", source, message, image_id, segment_id)
        if segment_id in seen:
            message = "two segments have this id"
            yield Fault("duplicate-segment", source, message, image_id, segment_id)
        seen.add(segment_id)


def instances_faults(
    content: Any, *, source: str, things: Mapping[int, str], images: Mapping[Hashable, Any]
) -> Iterator[Fault]:
    """What is wrong in a JSON of COCO instances that goes with a panoptic JSON.

    Args:
        content: the JSON, as read.
        source: the file, for the faults.
        things: the names of the thing categories of the panoptic JSON, by id.
        images: the images of the panoptic JSON by id; annotations of others are not looked at.
    """
    broken = list(_broken_rules(content, {"images": _list, "annotations": _list}))
    yield from (Fault(kind, source, message) for kind, message in broken)
    if broken:
        return
    categories = content.get("categories")
    for category in categories if isinstance(categories, list) else ():
        if (message := other_name(category, things)) is not None:
            yield Fault("other-name", source, message)
    optional = {"segmentation": _mask, "iscrowd": _flag, "keypoints": _keypoints}
    ids = (image.get("id") for image in content["images"] if isinstance(image, dict))
    known = {image_id for image_id in ids if isinstance(image_id, Hashable)}
    if not known & images.keys():
        yield Fault("unknown-image", source, "none of its image ids is in the panoptic JSON")
    masks = [isinstance(a, dict) and bool(a.get("segmentation")) for a in content["annotations"]]
    for index, annotation in enumerate(content["annotations"]):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if is_of(image_id, Id) and image_id in known and image_id not in images:
            continue  # the panoptic JSON may hold a part of the images only
        broken = False
        for kind, message in _broken_rules(annotation, _INSTANCE, optional):
            broken = True
            yield Fault(kind, source, f"annotations[{index}]: {message}", image_id)
        if broken:
            continue
        entry = f"annotations[{index}]"
        if image_id not in known:
            yield Fault("unknown-image", source, f"{entry}: not in its images", image_id)
        elif annotation["category_id"] not in things:
            message = (
                f"{entry}: category_id {annotation['category_id']} is not a thing category of the "
                "panoptic JSON"
            )
            yield Fault("unknown-category", source, message, image_id)
        elif any(masks) and not masks[index]:
            message = f"{entry}: no mask in segmentation, but others have one: all do, or none"
            yield Fault("missing-mask", source, message, image_id)
        else:
            yield from _shape_faults(annotation, images[image_id], source, entry)


def other_name(category: Any, things: Mapping[int, str]) -> str | None:
    """What is wrong where a category of the JSON of instances has another name in the panoptic
    one: it would be learned as that."""
    if not isinstance(category, dict):
        return None
    number, name = category.get("id"), category.get("name")
    expected = things.get(number) if is_of(number, int) else None
    if name is None or expected is None or name == expected:
        return None
    return f"category {number} is {_short(name)}, but in the panoptic JSON it is {_short(expected)}"


def is_polygon(polygon: list[float]) -> bool:
    """Whether it has three points at least: x, y, x, y, ..."""
    return len(polygon) % 2 == 0 and len(polygon) >= 6


def _shape_faults(
    annotation: dict[str, Any], image: dict[str, Any], source: str, entry: str
) -> Iterator[Fault]:
    mask, image_id = annotation.get("segmentation"), annotation["image_id"]
    keypoints = annotation.get("keypoints", [])
    if len(keypoints) % 3:
        message = f"{entry}: keypoints is {_short(keypoints)}, expected {_keypoints[1]}"
        yield Fault("wrong-value", source, message, image_id)
    if isinstance(mask, dict) and mask["size"] != [image["height"], image["width"]]:
        message = (
            f"{entry}: segmentation is of size {_short(mask['size'])}, "
            f"expected [{image['height']}, {image['width']}]"
        )
        yield Fault("wrong-size", source, message, image_id)
    elif isinstance(mask, dict):
        fault = counts_fault(mask["counts"], image["height"] * image["width"])
        if fault:
            yield Fault("wrong-value", source, f"{entry}: segmentation has {fault}", image_id)
    elif isinstance(mask, list) and not is_of(mask, Polygons):
        message = (
            f"{entry}: segmentation is {_short(mask)}, expected a list of polygons, each a list of "
            "numbers: [[x, y, x, y, ...]]"
        )
        yield Fault("wrong-value", source, message, image_id)


def raise_first(*faults: Iterator[Fault]) -> None:
    """Raise UserError for the first fault, if there is one."""
    for fault in chain(*faults):
        raise UserError(f"{fault}; tools/check_dataset.py lists all faults of a dataset")
