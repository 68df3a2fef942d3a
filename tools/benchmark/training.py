"""Training: a step of both models, of their semantic heads alone, and the data path."""

import argparse
import functools
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from .data_path import compare_data, compare_targets
from .frame import MB, Stages, by_turns
from .heads import compare_heads
from .models import DEPTHS, SETTINGS, Scene, Setting, build_both, config
from .precision import autocast, tolerance
from .results import Comparison, Peer, Times

NUM_OBJECTS = 8  # an image of COCO has 7.3
STEP = ("forward", "backward", "optimizer")


def training(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """For each size a step of the semantic head alone (forward, backward), one of the model (and
    SGD), and the data path of its input images."""
    comparisons = []
    for setting in args.sizes or [SETTINGS["coco"]]:
        cfg = config(setting, depth=DEPTHS[args.backbone], device=args.device)
        comparisons += compare_heads(cfg, setting, args)
        comparisons += compare_steps(cfg, setting, args)
        comparisons.append(compare_data(cfg, setting, args))
        comparisons += compare_targets(setting.output_size, args.data_images, args.rounds)
    return comparisons, []


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
    same = mine.keys() == theirs.keys() and max(differences.values()) <= tolerance(args)
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
