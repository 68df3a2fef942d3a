"""A training step of both models, and the images that one worker of the data loader makes."""

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_dataset import make_dataset
from benchmark_frame import MB, Comparison, Stages, Times, by_turns
from benchmark_inference import autocast
from benchmark_models import DEPTHS, Scene, Setting, build_both, config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from torch import nn

from panoptic_fpn_ext.data.mapper import PanopticFPNMapper
from panoptic_fpn_ext.evaluation.instance_ap import instance_annotations

NUM_OBJECTS = 8  # an image of COCO has 7.3
STEP = ("forward", "backward", "optimizer")


def training(args: argparse.Namespace) -> list[Comparison]:
    """For each size a step (forward, backward, SGD), and the data path of its input images."""
    comparisons = []
    for setting in args.sizes:
        cfg = config(setting, depth=DEPTHS[args.backbone], device=args.device)
        comparisons += compare_steps(cfg, setting, args)
        comparisons.append(compare_data(cfg, setting, args))
    return comparisons


class Step:
    """Training steps of one model, always with the same images."""

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        batch: list[dict[str, Any]],
        stages: Stages,
        precision: str,
    ) -> None:
        self.model = model.train()
        # Random weights diverge at the rate of pretrained ones.
        cfg = cfg.clone()
        cfg.SOLVER.BASE_LR = 1e-6
        self._optimizer = build_optimizer(cfg, model)
        self._batch = batch
        self._stages = stages
        self._precision = precision
        self._scaler = torch.amp.GradScaler(stages.device.type, enabled=precision == "fp16")

    def __call__(self) -> dict[str, torch.Tensor]:
        """The losses; those of both models are equal in the first step, which draws the same."""
        torch.manual_seed(0)
        batch = [dict(image) for image in self._batch]
        with EventStorage(0):
            self._stages.enter("forward")
            with autocast(self._stages.device, self._precision):
                losses = self.model(batch)
                loss = sum(losses.values())
            self._stages.enter("backward")
            self._scaler.scale(loss).backward()
            self._stages.enter("optimizer")
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in losses.items()}


def compare_steps(cfg: CfgNode, setting: Setting, args: argparse.Namespace) -> list[Comparison]:
    detectron2, ours, our_cfg = build_both(cfg, args.opts)
    batch = [
        image
        for seed in range(args.images)
        for image in Scene(setting, NUM_OBJECTS, args.device, seed).training_inputs()
    ]
    stages = Stages(args.device)
    steps = [
        Step(detectron2, cfg, batch, stages, args.detectron2_precision or args.precision),
        Step(ours, our_cfg, batch, stages, args.precision),
    ]
    first, turns = by_turns([functools.partial(stages.time, step) for step in steps], args.rounds)
    theirs, mine = ({k: v.item() for k, v in losses.items()} for losses, _ in first)
    differences = {
        f"{name} difference": abs(mine[name] - value) / max(abs(value), 1e-6)
        for name, value in theirs.items()
    }
    exact = {args.precision, args.detectron2_precision or args.precision} == {"fp32"}
    same = mine.keys() == theirs.keys() and max(differences.values()) <= (1e-3 if exact else 0.05)
    detectron2_mb, ours_mb = (
        round(max(stage.peak for stage in stages.memory(step)) / MB, 1) for step in steps
    )
    rows = []
    for stage in (*STEP, ""):
        detectron2_ms, ours_ms = (
            Times.of([seconds[stage] for _, seconds in turn], args.images) for turn in turns
        )
        whole: dict[str, Any] = {}
        if not stage:
            whole = {"ours_mb": ours_mb, "detectron2_mb": detectron2_mb, "agreement": differences}
        rows.append(
            Comparison(
                what=stage or f"training step, {args.images} image(s)",
                size="x".join(map(str, setting.input_size)),
                ours_ms=ours_ms,
                detectron2_ms=detectron2_ms,
                same_answer=same,
                **whole,
            )
        )
    return rows


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
        converted = []
        for record in records:
            record = {**record, "annotations": instance_annotations(record)}
            for annotation in record["annotations"]:
                annotation["bbox_mode"] = BoxMode.XYWH_ABS
            del record["pan_seg_file_name"], record["segments_info"]
            converted.append(record)
        stages = Stages(torch.device("cpu"))
        # Detectron2's changes what it is given.
        run_detectron2 = functools.partial(
            stages.time,
            functools.partial(map_all, DatasetMapper(cfg, is_train=True), converted),
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
