"""One image through both models: whole and stage by stage, time and memory."""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from benchmark_frame import MB, Comparison, Peer, StageMemory, Stages, Times, by_turns
from benchmark_models import (
    AFTER,
    DEPTHS,
    NETWORK,
    PREPROCESS,
    Scene,
    Setting,
    agreement,
    agrees,
    build_both,
    config,
    planted_scores,
)
from torch import nn

from panoptic_fpn_ext.config import OUTPUTS
from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor

OUTPUT_CHOICES = {"panoptic_seg": ["panoptic_seg"], "all": list(OUTPUTS)}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def inference(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """Every size with every number of detections.

    Detectron2's model always makes all three outputs; ours makes those asked for.
    """
    comparisons: list[Comparison] = []
    peers: list[Peer] = []
    for setting in args.sizes:
        cfg = config(setting, depth=DEPTHS[args.backbone], device=args.device)
        detectron2, ours, our_cfg = build_both(cfg, args.opts)
        detectron2.eval()
        ours.eval()
        postprocessors = {}
        for name in OUTPUT_CHOICES if args.outputs == "both" else [args.outputs]:
            our_cfg.MODEL.PANOPTIC_FPN.OUTPUTS = OUTPUT_CHOICES[name]
            postprocessors[name] = PanopticPostprocessor(our_cfg)
        for number in args.detections:
            scene = Scene(setting, number, args.device)
            comparisons += compare(detectron2, ours, postprocessors, scene, args)
        if args.peers:
            peers += time_peers(setting, args)
    return comparisons, peers


def compare(
    detectron2: nn.Module,
    ours: nn.Module,
    postprocessors: dict[str, PanopticPostprocessor],
    scene: Scene,
    args: argparse.Namespace,
) -> list[Comparison]:
    """Rows for one scene: the stages of the network once, the rest for each choice of outputs."""
    stages = Stages(args.device)

    def predict(model: nn.Module, precision: str) -> dict[str, Any]:
        stages.enter(PREPROCESS)
        with torch.no_grad(), autocast(args.device, precision):
            return model(scene.inputs)[0]

    def run_detectron2(measure: Callable) -> Any:
        with scene.shown_to(detectron2, stages):
            return measure(
                functools.partial(predict, detectron2, args.detectron2_precision or args.precision)
            )

    def run_ours(outputs: str, measure: Callable) -> Any:
        ours.postprocess = postprocessors[outputs]
        with scene.shown_to(ours, stages):
            return measure(functools.partial(predict, ours, args.precision))

    runs = [run_detectron2, *(functools.partial(run_ours, name) for name in postprocessors)]
    first, turns = by_turns([functools.partial(run, stages.time) for run in runs], args.rounds)
    answers = [outputs for outputs, _ in first]
    seconds = [[by_stage for _, by_stage in turn] for turn in turns]
    found = {
        name: agreement(answer, answers[0])
        for name, answer in zip(postprocessors, answers[1:], strict=True)
    }
    del first, turns, answers
    memory = [memory_of(run(stages.memory)) for run in runs]

    exact = {args.precision, args.detectron2_precision or args.precision} == {"fp32"}
    rows = []
    for place, name in enumerate(postprocessors, 1):
        same = agrees(found[name], exact=exact)

        def row(stage: str, place: int = place, same: bool = same, **rest: Any) -> Comparison:
            ours_ms, detectron2_ms = (
                Times.of([by_stage[stage] for by_stage in seconds[i]]) for i in (place, 0)
            )
            return Comparison(
                what=stage or "whole image",
                size=str(scene.setting),
                ours_ms=ours_ms,
                detectron2_ms=detectron2_ms,
                same_answer=same,
                detections=scene.num_objects,
                **rest,
            )

        if place == 1:
            rows += [row(stage) for stage in NETWORK]
        for stage in (AFTER, ""):
            amounts = {"ours_mb": memory[place][stage], "detectron2_mb": memory[0][stage]}
            rows.append(row(stage, outputs=name, agreement=found[name], **amounts))
    return rows


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def memory_of(stages: Sequence[StageMemory]) -> dict[str, float]:
    """MB beyond weights and the features of the backbone: of the whole, under ``""``, from there
    on; and after the network: what is made there, and the logits that wait for it."""
    by_name = {stage.stage: stage for stage in reversed(stages)}  # the first of each
    features = by_name["semantic head"].start
    logits = by_name["RPN"].start - features
    upsampling, rest = (stage for stage in stages if stage.stage == AFTER)
    after = max(upsampling.peak - upsampling.start, logits + rest.peak - rest.start)
    heads = itertools.dropwhile(lambda stage: stage.stage in (PREPROCESS, "backbone"), stages)
    whole = max(stage.peak for stage in heads) - features
    return {AFTER: round(after / MB, 1), "": round(whole / MB, 1)}


# What people would pick instead


def time_peers(setting: Setting, args: argparse.Namespace) -> list[Peer]:
    """Other networks of random weights, those that are installed, by turns."""
    builders: Iterable[Callable] = (torchvision_mask_rcnn, mask2former)
    runs = {}
    for build in builders:
        try:
            name, run = build(setting, max(args.detections), args.device)
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


def torchvision_mask_rcnn(
    setting: Setting, detections: int, device: torch.device
) -> tuple[str, Callable]:
    """Mask R-CNN with ResNet-50: instances alone, their masks at the size of the input."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    height, width = setting.input_size
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=setting.num_things + 1,
        box_detections_per_img=detections,
        min_size=min(height, width),
        max_size=max(height, width),
    )
    for name, value in model.state_dict().items():
        if name.endswith("bn3.weight"):
            value *= 0.1  # see build_both
    model.to(device).eval()
    model.roi_heads.box_predictor.register_forward_hook(
        lambda _, inputs, outputs: (
            planted_scores(outputs[0], detections, background=0),
            outputs[1],
        )
    )
    image = Scene(setting, detections, torch.device("cpu")).image.to(device) / 255
    return f"torchvision Mask R-CNN R50, {detections} detections", lambda: model([image])


def mask2former(setting: Setting, detections: int, device: torch.device) -> tuple[str, Callable]:
    """Mask2Former with Swin-T: the network alone, nothing after it."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig()).to(device).eval()
    image = Scene(setting, detections, torch.device("cpu")).image.to(device)[None] / 255
    return "transformers Mask2Former Swin-T, network alone", lambda: model(pixel_values=image)
