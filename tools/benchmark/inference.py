"""One image through both models: whole and stage by stage, time and memory."""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from panoptic_fpn_ext.config import OUTPUTS
from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor

from .frame import MB, StageMemory, Stages, by_turns
from .models import (
    AFTER,
    DEPTHS,
    MERGING,
    NETWORK,
    PREPROCESS,
    SETTINGS,
    UPSAMPLING,
    Batch,
    Setting,
    agreement,
    agrees,
    build_both,
    config,
)
from .peers import mask2former, torchvision_mask_rcnn
from .precision import autocast, is_exact
from .results import Comparison, Peer, Times

OUTPUT_CHOICES = {"panoptic_seg": ["panoptic_seg"], "all": list(OUTPUTS)}

DETECTIONS = (10, 30, 100)
# Of --growth; the first of each while another axis grows.
GROWTH_SIZES = tuple(Setting(size, size) for size in ((400, 608), (200, 304), (800, 1216)))
GROWTH_DETECTIONS = (30, 10, 100, 300)
GROWTH_CLASSES = (54, 19, 171)


def inference(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """What :func:`plan` says.

    Detectron2's model always makes all three outputs; ours makes those asked for.
    """
    comparisons: list[Comparison] = []
    peers: list[Peer] = []
    for setting, detections in plan(args).items():
        cfg = config(setting, depth=DEPTHS[args.backbone], device=args.device)
        detectron2, ours, our_cfg = build_both(cfg, args.opts)
        detectron2.eval()
        ours.eval()
        postprocessors = {}
        for name in OUTPUT_CHOICES if args.outputs == "both" else [args.outputs]:
            our_cfg.MODEL.PANOPTIC_FPN.OUTPUTS = OUTPUT_CHOICES[name]
            postprocessors[name] = PanopticPostprocessor(our_cfg)
        for number in detections:
            batch = Batch(setting, number, args.device, args.images)
            rows = compare(detectron2, ours, postprocessors, batch, args)
            comparisons += [row for row in rows if row.outputs or not args.growth]
        if args.peers:
            peers += time_peers(setting, max(detections), args)
    return comparisons, peers


def plan(args: argparse.Namespace) -> dict[Setting, list[int]]:
    """Numbers of detections for each setting: every size, number of classes and number of
    detections with every other; or, to see growth, the first of each with all of one."""
    if args.growth:
        defaults: tuple = GROWTH_SIZES, GROWTH_CLASSES, GROWTH_DETECTIONS
    else:
        defaults = SETTINGS.values(), (None,), DETECTIONS  # each size with its own classes
    given = args.sizes, args.classes, args.detections
    points = list(itertools.product(*(a or b for a, b in zip(given, defaults, strict=True))))
    if args.growth:
        first = points[0]
        points = [p for p in points if sum(a != b for a, b in zip(p, first, strict=True)) <= 1]
    detections: dict[Setting, list[int]] = {}
    for setting, classes, number in points:
        setting = replace(setting, num_classes=classes or setting.num_classes)
        detections.setdefault(setting, []).append(number)
    return detections


def compare(
    detectron2: nn.Module,
    ours: nn.Module,
    postprocessors: dict[str, PanopticPostprocessor],
    batch: Batch,
    args: argparse.Namespace,
) -> list[Comparison]:
    """Rows for one batch: the stages of the network once, the rest for each choice of outputs."""
    stages = Stages(args.device)

    def predict(model: nn.Module, precision: str) -> list[dict[str, Any]]:
        stages.enter(PREPROCESS)
        with torch.no_grad(), autocast(args.device, precision):
            return model(batch.inputs)

    def run_detectron2(measure: Callable) -> Any:
        with batch.shown_to(detectron2, stages):
            return measure(
                functools.partial(predict, detectron2, args.detectron2_precision or args.precision)
            )

    def run_ours(outputs: str, measure: Callable) -> Any:
        ours.postprocess = postprocessors[outputs]
        with batch.shown_to(ours, stages):
            return measure(functools.partial(predict, ours, args.precision))

    runs = [run_detectron2, *(functools.partial(run_ours, name) for name in postprocessors)]
    product = MatrixProduct(stages, args.precision)
    timed = [*(functools.partial(run, stages.time) for run in runs), product]
    first, turns = by_turns(timed, args.rounds)
    *answers, _ = (outputs for outputs, _ in first)
    *seconds, product_seconds = ([by_stage for _, by_stage in turn] for turn in turns)
    peak = product.flops / min(by_stage[""] for by_stage in product_seconds)
    found = {
        name: agreement(answer, answers[0])
        for name, answer in zip(postprocessors, answers[1:], strict=True)
    }
    del first, turns, answers
    resident = functools.partial(stages.resident, since="semantic head")
    memory = [memory_of(run(stages.memory), run(resident)) for run in runs]
    with FlopCounterMode(display=False) as counter:
        run_detectron2(lambda predict: predict())  # the same network, all of it direct
    flops = counter.get_total_flops() / args.images
    floor = {"multiply_adds": round(flops / 2), "floor_ms": round(1000 * flops / peak, 3)}

    exact = is_exact(args) and ours.acceleration.precision == "float32"
    rows = []
    for place, name in enumerate(postprocessors, 1):
        same = agrees(found[name], exact=exact)

        def row(stage: str, place: int = place, same: bool = same, **rest: Any) -> Comparison:
            ours_ms, detectron2_ms = (
                Times.of([by_stage[stage] for by_stage in seconds[i]], args.images)
                for i in (place, 0)
            )
            return Comparison(
                what=stage or "whole image",
                size=str(batch.setting),
                ours_ms=ours_ms,
                detectron2_ms=detectron2_ms,
                same_answer=same,
                detections=batch.num_objects,
                classes=batch.setting.num_classes,
                **rest,
            )

        # A graph has no stages.
        def told(stage: str, place: int = place) -> bool:
            return all(stage in by_stage for by_stage in seconds[place])

        if place == 1:
            rows += [row(stage) for stage in NETWORK if told(stage)]
        rows += [row(part, outputs=name) for part in (UPSAMPLING, MERGING)]
        for stage in (AFTER, ""):
            amounts = {
                f"{side}_{kind}": amount
                for side, i in (("ours", place), ("detectron2", 0))
                for kind, amount in memory[i][stage].items()
            } | ({} if stage else floor)
            rows.append(row(stage, outputs=name, agreement=found[name], **amounts))
    return rows


def memory_of(
    stages: Sequence[StageMemory], resident: int | None
) -> dict[str, dict[str, float | None]]:
    """MB beyond weights, the input and the features of the backbone.

    Args:
        stages: from :meth:`Stages.memory`.
        resident: from :meth:`Stages.resident`, after the backbone.

    Returns:
        Of the whole, under ``""``, all after the backbone, and the same as the system counts; and
        after the network, what is made there, and the logits that wait for it.
    """
    by_name = {stage.stage: stage for stage in reversed(stages)}  # the first of each
    if "semantic head" not in by_name:  # a graph, which has no stages
        return {AFTER: {}, "": {}}
    features = by_name["semantic head"].low
    logits = by_name["RPN"].low - features
    upsampling, rest = (stage for stage in stages if stage.stage == AFTER)
    after = max(upsampling.rise, logits + rest.rise)
    heads = itertools.dropwhile(lambda stage: stage.stage in (PREPROCESS, "backbone"), stages)
    whole = max(stage.peak for stage in heads) - features
    resident_mb = None if resident is None else round((resident - features) / MB, 1)
    return {
        AFTER: {"mb": round(after / MB, 1)},
        "": {"mb": round(whole / MB, 1), "resident_mb": resident_mb},
    }


class MatrixProduct:
    """A product of large matrices, to measure the machine's peak."""

    def __init__(self, stages: Stages, precision: str) -> None:
        self._stages = stages
        self._precision = precision
        side = 8192 if stages.device.type == "cuda" else 2048
        self._matrix = torch.ones(side, side, device=stages.device)
        self.flops = 2 * side**3

    def __call__(self) -> tuple[torch.Tensor, dict[str, float]]:
        """What :meth:`Stages.time` tells of it."""
        with torch.no_grad(), autocast(self._stages.device, self._precision):
            return self._stages.time(lambda: self._matrix @ self._matrix)


def time_peers(setting: Setting, detections: int, args: argparse.Namespace) -> list[Peer]:
    """Other networks of random weights, those that are installed, by turns."""
    builders: Iterable[Callable] = (torchvision_mask_rcnn, mask2former)
    runs = {}
    for build in builders:
        try:
            name, run = build(setting, detections, args.device)
        except ImportError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"left out: {build.__name__}: {reason}", file=sys.stderr)
        else:
            runs[name] = run
    stages = Stages(args.device)

    def timed(run: Callable[[], Any]) -> float:
        with torch.no_grad(), autocast(args.device, args.precision):
            return stages.time(run)[1][""]

    _, turns = by_turns([functools.partial(timed, run) for run in runs.values()], args.rounds)
    return [
        Peer(name, str(setting), Times.of(turn)) for name, turn in zip(runs, turns, strict=True)
    ]
