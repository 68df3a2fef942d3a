"""From files to the input of training: what one worker of the data loader does."""

import argparse
import collections
import copy
import functools
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
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, detection_utils
from detectron2.structures import BoxMode
from pycocotools import mask as rle

from panoptic_fpn_ext import add_panoptic_fpn_config
from panoptic_fpn_ext.data import mapper as our_mapper
from panoptic_fpn_ext.data.mapper import PanopticFPNMapper
from panoptic_fpn_ext.evaluation.instance_ap import instance_annotations

from .dataset import make_dataset
from .frame import Stages, by_turns
from .models import Setting
from .results import Comparison, Times

NUM_SAMPLES, MASK_SIZE = 128, 28  # for the mask loss: a quarter of ROI heads' 512, and its targets


def compare_data(cfg: CfgNode, setting: Setting, args: argparse.Namespace) -> Comparison:
    """From files to the model's input: our mapper from the panoptic PNG, Detectron2's from what it
    wants converted before, semantic PNGs and instance annotations."""
    name = f"benchmark_{setting}".replace(" ", "_")
    height, width = setting.output_size
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(name, Path(folder), height, width, args.data_images)
        records = DatasetCatalog.get(name)
        cfg = cfg.clone()
        cfg.DATASETS.TRAIN = (name,)
        cfg.INPUT.MASK_FORMAT = "bitmask"
        cfg.INPUT.MIN_SIZE_TRAIN = (min(setting.input_size),)
        cfg.INPUT.MAX_SIZE_TRAIN = max(setting.input_size)
        stages = Stages(torch.device("cpu"))
        # Detectron2's changes what it is given.
        run_detectron2 = functools.partial(
            stages.time,
            functools.partial(
                map_all, DatasetMapper(cfg, is_train=True), converted(records, "bitmask")
            ),
        )
        run_ours = functools.partial(
            stages.time,
            functools.partial(map_all, PanopticFPNMapper(cfg, is_train=True), records),
        )
        first, turns = by_turns([run_detectron2, run_ours], args.rounds)
    detectron2_ms, ours_ms = (
        Times.of([seconds[""] for _, seconds in turn], len(records)) for turn in turns
    )
    same = all(same_input(a, b) for a, b in zip(*(answers for answers, _ in first), strict=True))
    return Comparison(
        what="data, one worker",
        size=str(Setting(setting.output_size, setting.input_size)),
        ours_ms=ours_ms,
        detectron2_ms=detectron2_ms,
        same_answer=same,
    )


def map_all(mapper: Callable[[dict], dict], records: list[dict]) -> list[dict]:
    np.random.seed(0)  # augmentation draws from it
    return [mapper(copy.copy(record)) for record in records]


def same_input(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the inputs of a model are equal, instances in whatever order."""
    instances = [
        sorted(zip(x["instances"].gt_classes.tolist(), areas(x), strict=True)) for x in (a, b)
    ]
    return (
        torch.equal(a["image"], b["image"])
        and torch.equal(a["sem_seg"], b["sem_seg"])
        and instances[0] == instances[1]
    )


def areas(inputs: dict[str, Any]) -> list[int]:
    return inputs["instances"].gt_masks.tensor.sum(dim=(1, 2)).tolist()


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
    names = {record["file_name"] for record in records}
    theirs, ours = detection_utils.read_image, our_mapper.read_image

    keep = functools.cache(theirs)
    images = {}

    def read_ours(record: dict[str, Any], image_format: str) -> np.ndarray:
        key = record["file_name"], image_format
        if key not in images:
            images[key] = ours(record, image_format)
        return images[key]

    def read_theirs(name: str, format: str | None = None) -> np.ndarray:
        return (keep if name in names else theirs)(name, format)

    with (
        mock.patch.object(detection_utils, "read_image", read_theirs),
        mock.patch.object(our_mapper, "read_image", read_ours),
    ):
        yield
