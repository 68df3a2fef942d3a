"""A made-up dataset for the benchmarks: scenes, its files, and predictions right in part.

And the making of training targets from its files, without images.
"""

import collections
import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils
from detectron2.structures import BitMasks, BoxMode, Instances
from PIL import Image
from pycocotools import mask as rle

from panoptic_fpn_ext import add_panoptic_fpn_config, register_panoptic_dataset
from panoptic_fpn_ext.data.mapper import PanopticFPNMapper
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.data.targets import sem_seg_from_panoptic
from panoptic_fpn_ext.evaluation.detectron2_evaluators import instances_json
from panoptic_fpn_ext.evaluation.instance_ap import instance_annotations

from .frame import Comparison, Times, by_turns

NUM_THINGS, NUM_STUFF = 8, 11  # as Cityscapes
NUM_SAMPLES, MASK_SIZE = 128, 28  # for the mask loss: a quarter of ROI heads' 512, and its targets


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


def compare_targets(size: tuple[int, int], num_images: int, rounds: int) -> list[Comparison]:
    """Training targets from files: our mapper's from the panoptic PNG, and those of Detectron2's
    from a semantic PNG and instances as RLE, which it decodes, or as polygons, which it keeps.

    Images are there already and not resized. The mask loss reads none of these masks as they are,
    so each is also measured with the crops that it makes for :data:`NUM_SAMPLES` boxes.
    """
    name = "benchmark_targets_{}x{}".format(*size)
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(name, Path(folder), *size, num_images)
        records = DatasetCatalog.get(name)
        cfg = get_cfg()
        add_panoptic_fpn_config(cfg)
        cfg.DATASETS.TRAIN = (name,)
        cfg.MODEL.MASK_ON = True
        cfg.INPUT.MIN_SIZE_TRAIN = (0,)  # images as they are, in size and order of colors
        cfg.INPUT.FORMAT = "RGB"
        for mask_format, kind in (("bitmask", "RLE"), ("polygon", "polygons")):
            cfg.INPUT.MASK_FORMAT = mask_format
            for cropped, with_crops in ((False, ""), (True, f", {NUM_SAMPLES} masks cropped")):
                make_both = [
                    functools.partial(make_targets, mapper(cfg, is_train=True), given, cropped)
                    for mapper, given in (
                        (DatasetMapper, converted(records, mask_format)),
                        (PanopticFPNMapper, records),
                    )
                ]
                with images_at_hand(records):
                    agreement = targets_agreement(*(make() for make in make_both))
                    _, turns = by_turns(
                        [functools.partial(timed, make) for make in make_both], rounds
                    )
                detectron2_ms, ours_ms = (Times.of(turn, num_images) for turn in turns)
                # Polygons are outlines with few corners.
                least_equal = {"crops_equal": 0.9} if mask_format == "polygon" else {}
                comparisons.append(
                    Comparison(
                        what=f"targets (Detectron2: {kind}){with_crops}",
                        size="x".join(map(str, size)),
                        ours_ms=ours_ms,
                        detectron2_ms=detectron2_ms,
                        same_answer=all(
                            share >= least_equal.get(kind, 1) for kind, share in agreement.items()
                        ),
                        agreement=agreement,
                    )
                )
    return comparisons


def converted(records: list[dict[str, Any]], mask_format: str) -> list[dict[str, Any]]:
    """Records as Detectron2's mapper wants them, annotations with RLE or, if told, polygons."""
    found = []
    for record in records:
        annotations = instance_annotations(record)
        for annotation in annotations:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
            if mask_format == "polygon" and not annotation["iscrowd"]:
                annotation["segmentation"] = outlines(rle.decode(annotation["segmentation"]))
        record = {**record, "annotations": annotations}
        del record["pan_seg_file_name"], record["segments_info"]
        found.append(record)
    return found


def outlines(mask: np.ndarray) -> list[list[float]]:
    """Polygons of a mask uint8 (H, W), with about as many corners as people draw."""
    # Of twice the size, so that they run along the edges of its pixels.
    mask = mask.repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [cv2.approxPolyDP(contour, 2, closed=True) for contour in contours]
    # A few pixels have no such outline, but corners.
    polygons = [p for p in polygons if len(p) > 2] or [cv2.boxPoints(cv2.minAreaRect(contours[0]))]
    return [(p.reshape(-1) / 2 + 0.25).tolist() for p in polygons]


def make_targets(
    mapper: Callable[[dict], dict], records: list[dict[str, Any]], cropped: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """The targets of each image, and the crops of masks, in the order of their boxes."""
    for seed, record in enumerate(records):
        np.random.seed(seed)  # augmentation draws from it
        inputs = mapper(copy.copy(record))
        instances = inputs["instances"]
        boxes = instances.gt_boxes.tensor
        order = torch.tensor(sorted(range(len(boxes)), key=lambda k: boxes[k].tolist()))
        found = {"sem_seg": inputs["sem_seg"], "classes": instances.gt_classes[order]}
        if cropped:
            samples = order[torch.arange(NUM_SAMPLES) % len(order)]
            shift = torch.linspace(-3, 3, NUM_SAMPLES)[:, None]  # proposals are not exact
            found["crops"] = instances.gt_masks[samples].crop_and_resize(
                boxes[samples] + shift, MASK_SIZE
            )
        yield found


def timed(make: Callable[[], Iterator[Any]]) -> float:
    """Seconds for all that ``make`` makes, of which one is kept in memory at a time."""
    start = time.perf_counter()
    collections.deque(make(), maxlen=1)
    return time.perf_counter() - start


def targets_agreement(
    theirs: Iterator[dict[str, torch.Tensor]], ours: Iterator[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """The share of equal values of each kind of target, the least of all images."""
    shares: dict[str, float] = {}
    for a, b in zip(theirs, ours, strict=True):
        for kind in a:
            share = (a[kind] == b[kind]).double().mean().item()
            shares[f"{kind}_equal"] = min(share, shares.get(f"{kind}_equal", 1.0))
    return shares


@contextmanager
def images_at_hand(records: list[dict[str, Any]]) -> Iterator[None]:
    """Have Detectron2 read the images of records once only; other files as ever."""
    read = detection_utils.read_image
    names = {record["file_name"] for record in records}

    keep = functools.cache(read)
    with mock.patch.object(
        detection_utils,
        "read_image",
        lambda name, format=None: (keep if name in names else read)(name, format),
    ):
        yield


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
