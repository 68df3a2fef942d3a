"""A made-up dataset for the benchmarks: scenes, its files, and predictions right in part."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Instances
from PIL import Image

from panoptic_fpn_ext import register_panoptic_dataset
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.data.targets import sem_seg_from_panoptic
from panoptic_fpn_ext.evaluation.detectron2_evaluators import instances_json

NUM_THINGS, NUM_STUFF = 8, 11  # as Cityscapes


def rgb(ids: np.ndarray) -> np.ndarray:
    """Segment ids as panopticapi colours them: uint8 array (H, W, 3)."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


def make_dataset(
    name: str, folder: Path, height: int, width: int, num_images: int
) -> list[dict[str, Any]]:
    """Register a dataset of made-up images with all that the evaluators want of it.

    Returns:
        Predictions for its images, which are right in part.
    """
    (folder / "panoptic").mkdir()
    categories = [
        {"id": 10 + i, "name": f"category {i}", "isthing": int(i < NUM_THINGS)}
        for i in range(NUM_THINGS + NUM_STUFF)
    ]
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, height, width) for _ in range(num_images)]
    images, annotations = [], []
    for image_id, (ids, segments) in enumerate(scenes, 1):
        png = f"{image_id:06}.png"
        Image.fromarray(rgb(ids)).save(folder / "panoptic" / png)  # as official ones are written
        Image.fromarray(picture(rng, ids)).save(folder / f"{image_id:06}.jpg", quality=95)
        images.append(
            {"id": image_id, "file_name": f"{image_id:06}.jpg", "height": height, "width": width}
        )
        annotations.append(
            {
                "image_id": image_id,
                "file_name": png,
                "segments_info": [
                    {
                        "id": s["id"],
                        "category_id": s["category_id"] + (10 if s["isthing"] else 9 + NUM_THINGS),
                        "iscrowd": s["iscrowd"],
                        "area": int((ids == s["id"]).sum()),
                        "bbox": [0, 0, width, height],
                    }
                    for s in segments
                ],
            }
        )
    panoptic_json = folder / "panoptic.json"
    panoptic_json.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    original = f"{name} as it is"
    register_panoptic_dataset(original, folder, folder / "panoptic", panoptic_json)
    convert_for_detectron2(original, name, folder)
    DatasetCatalog.remove(original)
    MetadataCatalog.remove(original)
    return [make_prediction(rng, *scene) for scene in scenes]


def convert_for_detectron2(name: str, new_name: str, folder: Path) -> list[dict[str, Any]]:
    """Register a dataset once more, with what Detectron2's evaluators want of it in a folder.

    Returns:
        Its records.
    """
    metadata = MetadataCatalog.get(name)
    json_file = folder / "instances.json"
    json_file.write_text(json.dumps(instances_json(name)))
    (folder / "sem_seg").mkdir()
    records = DatasetCatalog.get(name)
    for record in records:
        path = folder / "sem_seg" / f"{record['image_id']}.png"
        labels = sem_seg_from_panoptic(
            read_panoptic_png(record["pan_seg_file_name"]),
            record["segments_info"],
            thing_sem_seg_ids=metadata.thing_sem_seg_ids,
            ignore_label=metadata.ignore_label,
        )
        Image.fromarray(labels).save(path)
        record["sem_seg_file_name"] = str(path)
    DatasetCatalog.register(new_name, lambda: records)
    MetadataCatalog.get(new_name).set(
        **{**metadata.as_dict(), "name": new_name, "json_file": str(json_file)}
    )
    return records


def picture(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """An image of a panoptic map, each segment of a colour and a texture: uint8 (H, W, 3)."""
    colors = rng.integers(40, 216, (256, 3), dtype=np.int16)[ids % 256]
    grain = rng.integers(-20, 21, (*ids.shape, 1), dtype=np.int16)
    return (colors + grain).astype(np.uint8)


def make_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[dict]]:
    """A panoptic map: stuff with winding borders, 12 to 30 objects before it, void, a crowd.

    Returns:
        int32 array (H, W) of ids up to 2**24 - 1, and the segments, category ids contiguous.
    """
    fields = [smooth_noise(rng, height, width, cells=5) for _ in range(NUM_STUFF)]
    labels = np.argmax(fields, axis=0) + 1
    labels[np.abs(smooth_noise(rng, height, width, cells=9)) < 0.02] = 0
    categories = [(False, i + 1) for i in range(NUM_STUFF)]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(12, 31)):
        radius = height * rng.uniform(0.03, 0.15)
        center = rng.uniform(0, height), rng.uniform(0, width)
        distance = np.hypot(rows - center[0], (columns - center[1]) * rng.uniform(0.5, 2))
        ragged = smooth_noise(rng, height, width, cells=24)
        categories.append((True, int(rng.integers(NUM_THINGS))))
        labels[distance < radius * (1 + 0.3 * ragged)] = len(categories)
    ids = np.concatenate(([0], rng.choice(2**24 - 1, len(categories), replace=False) + 1))
    seen = np.flatnonzero(np.bincount(labels.reshape(-1), minlength=len(ids))[1:])
    crowd = int(seen[-1])
    segments = [
        {
            "id": int(ids[k + 1]),
            "isthing": categories[k][0],
            "category_id": categories[k][1],
            "iscrowd": int(k == crowd),
        }
        for k in seen.tolist()
    ]
    return ids[labels].astype(np.int32), segments


def make_prediction(
    rng: np.random.Generator, ids: np.ndarray, segments: list[dict]
) -> dict[str, Any]:
    """A model's outputs for a scene: borders shifted, some categories wrong, some segments lost."""
    height, width = ids.shape
    reach = height / 80
    shift = [reach * smooth_noise(rng, height, width, cells=16) for _ in range(2)]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    places = cv2.remap(
        np.searchsorted(sorted(s["id"] for s in segments), ids).astype(np.uint8) + np.uint8(1),
        (columns + shift[0]).astype(np.float32),
        (rows + shift[1]).astype(np.float32),
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_REPLICATE,
    )
    places[ids == 0] = 0
    panoptic, panoptic_segments = np.zeros((height, width), np.int32), []
    logits = torch.from_numpy(rng.random((NUM_STUFF + 1, height, width), dtype=np.float32))
    masks, classes, scores = [], [], []
    for place, segment in enumerate(sorted(segments, key=lambda s: s["id"]), 1):
        mask = places == place
        if not mask.any():
            continue
        isthing, category = segment["isthing"], segment["category_id"]
        logits[0 if isthing else category][torch.from_numpy(mask)] += 1
        if isthing:
            for _ in range(2):
                masks.append(np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1)))
                wrong = rng.random() < 0.2
                classes.append(int(rng.integers(NUM_THINGS)) if wrong else category)
                scores.append(rng.random())
        if rng.random() < 0.9:
            panoptic_segments.append(
                {
                    "id": len(panoptic_segments) + 1,
                    "isthing": isthing,
                    "category_id": (category + 1) % NUM_THINGS
                    if isthing and rng.random() < 0.1
                    else category,
                }
            )
            panoptic[mask] = len(panoptic_segments)
    instances = Instances((height, width))
    instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
    instances.pred_boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    return {
        "panoptic_seg": (torch.from_numpy(panoptic), panoptic_segments),
        "sem_seg": logits,
        "instances": instances,
    }


def smooth_noise(rng: np.random.Generator, height: int, width: int, *, cells: int) -> np.ndarray:
    """Float32 array (H, W), about from -1 to 1, that changes over a ``cells``-th of the height."""
    grid = rng.uniform(-1, 1, (cells, max(1, cells * width // height))).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
