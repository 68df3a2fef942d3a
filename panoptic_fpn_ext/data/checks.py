"""Checks of a whole panoptic dataset: every file is read, everything that is wrong is listed."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import UserError
from .coco_json import Fault, instances_faults, is_polygon, panoptic_faults, read_json
from .image_files import read_image
from .panoptic_png import hint_of_swapped_bytes, read_panoptic_png
from .targets import segment_boxes


@dataclass
class Statistics:
    """What a dataset consists of: pixels and segments, by name of the category."""

    images: int = 0
    pixels: int = 0
    void_pixels: int = 0
    crowd_pixels: int = 0
    segments: Counter = field(default_factory=Counter)
    crowds: Counter = field(default_factory=Counter)
    category_pixels: Counter = field(default_factory=Counter)

    def add(self, other: "Statistics") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Report:
    """The faults of a dataset, in the order of its JSON, and what it consists of."""

    faults: list[Fault]
    statistics: Statistics

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "faults": [vars(fault) for fault in self.faults],
            "statistics": vars(self.statistics),
        }


@dataclass(frozen=True)
class _Image:
    """An image of the JSON with its annotation, as far as these are usable."""

    file_name: str
    pan_seg_file_name: str | None
    image_id: Hashable
    height: int
    width: int
    segments_info: Sequence[dict[str, Any]]


def check_panoptic_dataset(
    *,
    image_root: str | os.PathLike,
    panoptic_root: str | os.PathLike,
    panoptic_json: str | os.PathLike,
    instances_json: str | os.PathLike | None = None,
    image_file_name: Callable[[dict[str, Any]], str] = itemgetter("file_name"),
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Read all of a dataset in the COCO panoptic format, and list what is wrong with it.

    Args:
        image_root, panoptic_root, panoptic_json, instances_json, image_file_name: as in
            :func:`~panoptic_fpn_ext.data.registration.register_panoptic_dataset`.
        workers: processes to read the images in; 0 reads them in this one.
        progress: show a progress bar.

    Returns:
        The report. Files that the JSON does not name are not faults.
    """
    source = str(panoptic_json)
    try:
        content = read_json(source)
    except UserError as error:
        return Report([_of_file("unreadable-json", source, error)], Statistics())
    faults = list(panoptic_faults(content, source=source))
    images = list(_usable_images(content, image_root, panoptic_root, image_file_name))
    faults += [
        Fault("missing-annotation", source, "in images, but has no annotation", image.image_id)
        for image in images
        if image.pan_seg_file_name is None
    ]
    if instances_json is not None:
        faults += _instances_faults(str(instances_json), content)

    statistics = Statistics()
    names = _category_names(content)
    loader = DataLoader(
        _ImageChecks(images, source, names),
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_one_thread,
    )
    for image_faults, image_statistics in tqdm(
        loader, desc="check", unit="image", disable=not progress
    ):
        faults += image_faults
        statistics.add(image_statistics)
    return Report(faults, statistics)


class _ImageChecks(Dataset):
    """Faults and statistics of each image."""

    def __init__(self, images: list[_Image], source: str, names: dict[int, str]) -> None:
        self._images, self._source, self._names = images, source, names

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[list[Fault], Statistics]:
        image = self._images[index]
        faults = _image_file_faults(image)
        if image.pan_seg_file_name is None:
            return faults, Statistics(images=1)
        png_faults, statistics = _png_faults(image, self._source, self._names)
        return faults + png_faults, statistics


def _image_file_faults(image: _Image) -> list[Fault]:
    record = {"file_name": image.file_name, "height": image.height, "width": image.width}
    try:
        read_image(record, "BGR", strict=True)
    except UserError as error:
        kind = "unreadable-image" if "cannot read" in str(error) else "wrong-size"
        return [_of_file(kind, image.file_name, error, image.image_id)]
    return []


def _png_faults(
    image: _Image, source: str, names: dict[int, str]
) -> tuple[list[Fault], Statistics]:
    """Faults of a panoptic PNG, alone and against the JSON ``source``."""
    png, image_id = image.pan_seg_file_name, image.image_id
    try:
        ids = read_panoptic_png(png)
    except UserError as error:
        return [_of_file("unreadable-png", png, error, image_id)], Statistics(images=1)
    segments = segment_boxes(ids)
    values = segments.values.tolist()
    areas = dict(zip(values, segments.areas.tolist(), strict=True))
    boxes = dict(zip(values, segments.boxes.tolist(), strict=True))
    statistics = Statistics(images=1, pixels=ids.size, void_pixels=areas.get(0, 0))
    faults = []
    if ids.shape != (image.height, image.width):
        message = (
            f"{ids.shape[1]}x{ids.shape[0]} pixels (width x height), but {source} says "
            f"{image.width}x{image.height}"
        )
        faults.append(Fault("wrong-size", png, message, image_id))
    listed = {info["id"] for info in image.segments_info if isinstance(info.get("id"), int)}
    unlisted = [value for value in values if value and value not in listed]
    hint = hint_of_swapped_bytes(unlisted, listed)
    for value in unlisted:
        message = f"{areas[value]} pixels of it, but it is not in segments_info of {source}{hint}"
        faults.append(Fault("id-not-in-json", png, message, image_id, value))
    for info in image.segments_info:
        segment_id = info.get("id")
        if not segment_id or not isinstance(segment_id, Hashable):  # a fault of the JSON
            continue
        if segment_id not in areas:
            message = f"in segments_info, but {png} has no pixel of it"
            faults.append(Fault("id-not-in-png", source, message, image_id, segment_id))
            continue
        faults += _area_and_box_faults(info, areas[segment_id], boxes[segment_id], image_id, source)
        crowd = bool(info.get("iscrowd"))
        category = info.get("category_id")
        name = names.get(category, "unknown") if isinstance(category, Hashable) else "unknown"
        statistics.crowd_pixels += areas[segment_id] * crowd
        statistics.category_pixels[name] += areas[segment_id]
        (statistics.crowds if crowd else statistics.segments)[name] += 1
    return faults, statistics


def _area_and_box_faults(
    info: dict[str, Any], area: int, box: list[int], image_id: Hashable, source: str
) -> list[Fault]:
    """Faults of ``area`` and ``bbox`` of a segment; ``box`` is x0, y0, x1, y1 of its pixels."""
    x0, y0, x1, y1 = box
    expected = {"area": area, "bbox": [x0, y0, x1 - x0, y1 - y0]}
    return [
        Fault(
            f"wrong-{name}",
            source,
            f"{name} is {info[name]!r}, but its pixels have {value}",
            image_id,
            info["id"],
        )
        for name, value in expected.items()
        if name in info and info[name] != value
    ]


def _usable_images(
    content: Any,
    image_root: str | os.PathLike,
    panoptic_root: str | os.PathLike,
    image_file_name: Callable[[dict[str, Any]], str],
) -> list[_Image]:
    """The images that can be checked, each once; why others cannot is a fault of the JSON."""
    if not isinstance(content, dict):
        return []
    annotations = {}
    for annotation in _dicts(content.get("annotations")):
        if isinstance(annotation.get("file_name"), str) and isinstance(
            annotation.get("image_id"), (int, str)
        ):
            annotations.setdefault(annotation["image_id"], annotation)
    images = {}
    for image in _dicts(content.get("images")):
        name, image_id = image.get("file_name"), image.get("id")
        size = image.get("height"), image.get("width")
        if (
            not isinstance(name, str)
            or not isinstance(image_id, (int, str))
            or not all(isinstance(side, int) and side > 0 for side in size)
        ):
            continue
        annotation = annotations.get(image_id)
        png = os.path.join(panoptic_root, annotation["file_name"]) if annotation else None
        segments = _dicts(annotation.get("segments_info")) if annotation else []
        segments = {repr(info.get("id")): info for info in reversed(segments)}
        path = os.path.join(image_root, image_file_name(image))
        images.setdefault(
            image_id, _Image(path, png, image_id, *size, list(segments.values())[::-1])
        )
    return list(images.values())


def _instances_faults(source: str, panoptic: Any) -> list[Fault]:
    try:
        content = read_json(source)
    except UserError as error:
        return [_of_file("unreadable-json", source, error)]
    if not isinstance(panoptic, dict):
        return []
    categories = _dicts(panoptic.get("categories"))
    things = {
        c["id"]: c.get("name")
        for c in categories
        if c.get("isthing") and isinstance(c.get("id"), (int, str))
    }
    images = {
        image["id"]: image
        for image in _dicts(panoptic.get("images"))
        if isinstance(image.get("id"), (int, str)) and {"height", "width"} <= image.keys()
    }
    faults = list(instances_faults(content, source=source, things=things, images=images))
    return faults or [*_short_polygon_faults(content["annotations"], images, source)]


def _short_polygon_faults(
    annotations: list[dict[str, Any]], images: Container[Hashable], source: str
) -> Iterator[Fault]:
    """Polygons that are left out when the dataset is loaded."""
    for index, annotation in enumerate(annotations):
        mask = annotation.get("segmentation")
        if annotation["image_id"] in images and isinstance(mask, list):
            for polygon in itertools.filterfalse(is_polygon, mask):
                message = (
                    f"annotations[{index}]: segmentation has a polygon of {len(polygon)} numbers, "
                    "expected x, y of three points at least"
                )
                yield Fault("short-polygon", source, message, annotation["image_id"])


def _category_names(panoptic: Any) -> dict[int, str]:
    categories = _dicts(panoptic.get("categories")) if isinstance(panoptic, dict) else []
    return {
        c["id"]: str(c.get("name", c["id"]))
        for c in categories
        if isinstance(c.get("id"), (int, str))
    }


def _dicts(entries: Any) -> list[dict[str, Any]]:
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _of_file(kind: str, file: str, error: UserError, image_id: Hashable = None) -> Fault:
    """The fault of an error, whose message begins with the file's name."""
    return Fault(kind, file, str(error).removeprefix(f"{file}: "), image_id)


def _identity(item: Any) -> Any:
    return item


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # 1 would wait for threads that only the process before the fork has
