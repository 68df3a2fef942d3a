"""Shapes in COCO's layout: https://cocodataset.org/#format-data"""

import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util
from shapes_scenes import CATEGORIES, Scene

SIZE = (128, 128)
NUM_IMAGES = {"train": 2000, "val": 200}


def owned(split: str) -> tuple[str, ...]:
    """What belongs to a split, files and folders, in the order of removal."""
    return *annotation_files(split), split, f"panoptic_{split}"


def picture_files(split: str, number: int) -> tuple[str, ...]:
    return f"{split}/{number:012d}.jpg", f"panoptic_{split}/{number:012d}.png"


def annotation_files(split: str) -> tuple[str, ...]:
    return f"annotations/instances_{split}.json", f"annotations/panoptic_{split}.json"


def render(split: str, number: int, scene: Scene) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A scene's two pictures, and its records for the annotation files."""
    height, width = scene.segment_map.shape
    ids = scene.segment_map
    bgr_ids = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], -1).astype(np.uint8)
    image_file, panoptic_file = picture_files(split, number)
    _, jpeg = cv2.imencode(
        ".jpg", np.ascontiguousarray(scene.image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 94]
    )
    _, png = cv2.imencode(".png", bgr_ids, [cv2.IMWRITE_PNG_COMPRESSION, 6])

    things = {category.id for category in CATEGORIES if category.isthing}
    segments_info, instances = [], []
    for segment in scene.segments:
        mask = ids == segment.id
        record = {
            "id": segment.id,
            "category_id": segment.category_id,
            "area": int(mask.sum()),
            "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
            "iscrowd": segment.iscrowd,
        }
        segments_info.append(record)
        if segment.category_id in things:
            outline = _run_lengths(mask) if segment.iscrowd else _outlines(mask)
            instances.append({**record, "image_id": number, "segmentation": outline})
    name = f"{number:012d}"
    return {image_file: jpeg.tobytes(), panoptic_file: png.tobytes()}, {
        "image": {"id": number, "file_name": f"{name}.jpg", "height": height, "width": width},
        "panoptic": {
            "image_id": number,
            "file_name": f"{name}.png",
            "segments_info": segments_info,
        },
        "instances": instances,
    }


def annotate(split: str, records: Sequence[dict[str, Any]], version: int) -> dict[str, bytes]:
    """The annotation files, from the records of all images."""
    info = {"description": "Shapes, drawn by make_shapes.py", "version": str(version)}
    images = [record["image"] for record in records]
    instances = [instance for record in records for instance in record["instances"]]
    # A segment's id is unique in its image only; an instance's, in the whole file.
    instances = [{**instance, "id": i} for i, instance in enumerate(instances, start=1)]
    panoptic = [record["panoptic"] for record in records]
    categories = [category._asdict() for category in CATEGORIES]
    things = [
        {key: category[key] for key in ("id", "name", "supercategory")}
        for category in categories
        if category["isthing"]
    ]
    contents = (
        {"info": info, "images": images, "annotations": instances, "categories": things},
        {"info": info, "images": images, "annotations": panoptic, "categories": categories},
    )
    return {
        name: (json.dumps(content, separators=(",", ":")) + "\n").encode()
        for name, content in zip(annotation_files(split), contents, strict=True)
    }


def _outlines(mask: np.ndarray) -> list[list[float]]:
    """``mask`` (H, W) as COCO polygons.

    A part with holes becomes one polygon whose outline is joined to those of its holes by lines
    run through to and fro, which an even-odd rasteriser (COCO's) and a non-zero one (Matplotlib's)
    both leave out.
    """
    # Doubled, OpenCV's outline runs a quarter pixel inside the mask, and a hole's as much
    # outside the hole: pixel centres stay clear of it.
    doubled = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons: dict[int, np.ndarray] = {}
    # Outer outlines (those without a parent) first.
    for i in sorted(range(len(contours)), key=lambda i: hierarchy[0][i][3] >= 0):
        points = cv2.approxPolyDP(contours[i], 0.6, True)
        points = (points if len(points) > 2 else contours[i])[:, 0]
        parent = int(hierarchy[0][i][3])
        if parent < 0:
            polygons[i] = points
            continue
        outer = polygons[parent]
        gaps = np.abs(outer[:, None] - points[None]).sum(-1)
        a, b = np.unravel_index(gaps.argmin(), gaps.shape)
        hole = np.concatenate([points[b:], points[: b + 1]])
        polygons[parent] = np.concatenate([outer[: a + 1], hole, outer[a:]])
    return [((points + 0.5) / 2).ravel().tolist() for points in polygons.values()]


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """``mask`` (H, W) as COCO RLE that fits into JSON."""
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
