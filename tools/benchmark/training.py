"""A training step of both models and of their semantic heads alone, and the images that one worker
of the data loader makes."""

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode, ImageList
from detectron2.utils.events import EventStorage
from efficiency import count, one_map
from torch import nn

from panoptic_fpn_ext.data.mapper import PanopticFPNMapper
from panoptic_fpn_ext.evaluation.instance_ap import instance_annotations

from .dataset import compare_targets, make_dataset
from .frame import MB, Comparison, Peer, Stages, Times, by_turns
from .inference import autocast
from .models import DEPTHS, SETTINGS, Scene, Setting, build_both, config

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


def tolerance(args: argparse.Namespace) -> float:
    """How far losses and gradients may be from Detectron2's, as a share of them."""
    exact = {args.precision, args.detectron2_precision or args.precision} == {"fp32"}
    return 1e-3 if exact else 0.05


class HeadStep:
    """Training steps of a semantic head, always with the same features and targets."""

    def __init__(
        self,
        head: nn.Module,
        features: dict[str, torch.Tensor],
        targets: torch.Tensor,
        stages: Stages,
        precision: str,
    ) -> None:
        self._head = head.train()
        self._features = {k: v.detach().requires_grad_() for k, v in features.items()}
        self._targets = targets
        self._stages = stages
        self._precision = precision
        self._scaler = torch.amp.GradScaler(stages.device.type, enabled=precision == "fp16")

    def __call__(self) -> torch.Tensor:
        """The loss; gradients stay until the next step."""
        self.clear()
        self._stages.enter("forward")
        with autocast(self._stages.device, self._precision):
            _, losses = self._head(self._features, self._targets)
        loss = losses["loss_sem_seg"]
        self._stages.enter("backward")
        self._scaler.scale(loss).backward()
        return loss.detach()

    def clear(self) -> None:
        """Free the gradients."""
        for tensor in (*self._features.values(), *self._head.parameters()):
            tensor.grad = None

    def differences(self, reference: "HeadStep") -> dict[str, float]:
        """Of the loss and of the gradients from a reference's: their mean as a share of its mean
        size. (Not the greatest: rounding turns single activations around 0 on and off.)"""
        losses = [step() for step in (self, reference)]
        features = [step._gradients(step._features) for step in (self, reference)]
        parameters = [
            step._gradients(dict(step._head.named_parameters())) for step in (self, reference)
        ]
        found = {"loss": losses, "feature gradients": features, "parameter gradients": parameters}
        return {
            f"{name} difference": ((mine - other).abs().mean() / other.abs().mean()).item()
            for name, (mine, other) in found.items()
        }

    def _gradients(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """All in one vector, in the order of the names."""
        gradients = [tensor.grad.flatten() for _, tensor in sorted(tensors.items())]
        return torch.cat(gradients) / self._scaler.get_scale()


class ConcatHead(SemSegFPNHead):
    """Detectron2's with the levels side by side, as plainly as can be: what the answers of ours
    are held against, since Detectron2's always sums."""

    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        levels = [
            level(features[name])
            for name, level in zip(self.in_features, self.scale_heads, strict=True)
        ]
        return self.predictor(torch.cat(levels, dim=1))


def compare_heads(cfg: CfgNode, setting: Setting, args: argparse.Namespace) -> list[Comparison]:
    """The semantic head's loss and gradients, for a pyramid of random features: ours that sums the
    levels, and ours that concatenates them, against Detectron2's, which sums."""
    detectron2, ours, our_cfg = build_both(cfg, args.opts)
    concat_cfg = our_cfg.clone()
    concat_cfg.MODEL.SEM_SEG_HEAD.AGGREGATION = "concat"
    heads = [m.sem_seg_head for m in (detectron2, ours, build_model(concat_cfg))]
    detectron2_head, _, concat = heads
    shapes = detectron2.backbone.output_shape()
    reference = ConcatHead(cfg, shapes)
    reference.predictor = Conv2d(concat.predictor.in_channels, setting.num_classes, kernel_size=1)
    reference.to(args.device).load_state_dict(concat.state_dict(), strict=True)

    targets = ImageList.from_tensors(
        [
            Scene(setting, 1, args.device, seed).training_inputs()[0]["sem_seg"].to(args.device)
            for seed in range(args.images)
        ],
        detectron2.backbone.size_divisibility,
        detectron2_head.ignore_value,
    ).tensor
    generator = torch.Generator().manual_seed(0)
    features = {}
    for name in detectron2_head.in_features:
        height, width = (side // shapes[name].stride for side in targets.shape[-2:])
        size = (args.images, shapes[name].channels, height, width)
        features[name] = torch.randn(size, generator=generator).to(args.device)
    our_features = features
    # As our backbone makes them.
    if our_cfg.MODEL.ACCELERATION.CHANNELS_LAST and args.device.type == "cuda":
        our_features = {
            k: v.contiguous(memory_format=torch.channels_last) for k, v in features.items()
        }

    more_arithmetic = multiply_adds(reference, shapes) / multiply_adds(detectron2_head, shapes)
    stages = Stages(args.device)
    precision = args.detectron2_precision or args.precision
    steps = [
        HeadStep(detectron2_head, features, targets, stages, precision),
        *(HeadStep(head, our_features, targets, stages, args.precision) for head in heads[1:]),
    ]
    references = [steps[0], HeadStep(reference, features, targets, stages, precision)]
    differences = [a.differences(b) for a, b in zip(steps[1:], references, strict=True)]
    del references

    def seconds(step: HeadStep) -> float:
        return stages.time(step)[1][""]

    _, turns = by_turns([functools.partial(seconds, step) for step in steps], args.rounds)
    detectron2_ms, *our_times = (Times.of(turn, args.images) for turn in turns)
    for step in steps:
        step.clear()
    detectron2_mb, *our_mb = (
        round(max(stage.peak for stage in stages.memory(step)) / MB, 1) for step in steps
    )
    names = ("sum", f"concat, {more_arithmetic:.2f} x the multiply-adds, against sum")
    extra = ({}, {"multiply-adds over sum": more_arithmetic})
    return [
        Comparison(
            what=f"semantic head's step, {name}, {args.images} image(s)",
            size="x".join(map(str, setting.input_size)),
            ours_ms=ours_ms,
            detectron2_ms=detectron2_ms,
            same_answer=max(differences[i].values()) <= tolerance(args),
            ours_mb=our_mb[i],
            detectron2_mb=detectron2_mb,
            agreement={**differences[i], **extra[i]},
        )
        for i, (name, ours_ms) in enumerate(zip(names, our_times, strict=True))
    ]


def multiply_adds(head: SemSegFPNHead, shapes: dict[str, ShapeSpec]) -> int:
    """Of the convolutions, for a small square image: all grow with its area."""
    side = max(shapes[name].stride for name in head.in_features)
    device = head.predictor.weight.device
    maps = [one_map(shapes[k], side // shapes[k].stride).to(device) for k in head.in_features]
    return count(
        head,
        *maps,
        function=lambda *maps: head.layers(dict(zip(head.in_features, maps, strict=True))),
    ).multiply_adds


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
