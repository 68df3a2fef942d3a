"""The dearest kernels of both models, in a training step and in an image."""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor

from .frame import Stages, environment
from .inference import OUTPUT_CHOICES
from .models import DEPTHS, SETTINGS, Batch, Scene, build_both, config
from .precision import autocast
from .training import NUM_OBJECTS, Step

DETECTIONS = 30
SHOWN = 10


def kernels(args: argparse.Namespace) -> int:
    """Print, and write as JSON, the kernels of a step of two images and of one image, panoptic
    output alone; on a CPU its operators."""
    setting = (args.sizes or [SETTINGS["coco"]])[0]
    cfg = config(setting, depth=DEPTHS[args.backbone], device=args.device)
    detectron2, ours, our_cfg = build_both(cfg, args.opts)
    our_cfg.MODEL.PANOPTIC_FPN.OUTPUTS = OUTPUT_CHOICES["panoptic_seg"]
    ours.postprocess = PanopticPostprocessor(our_cfg)
    batch = Batch(setting, DETECTIONS, args.device, 1)
    stages = Stages(args.device)
    inputs = [
        image
        for seed in range(2)
        for image in Scene(setting, NUM_OBJECTS, args.device, seed).training_inputs()
    ]

    def predict(model: torch.nn.Module) -> Any:
        model.eval()
        with torch.no_grad(), autocast(args.device, args.precision), batch.shown_to(model, stages):
            return model(batch.inputs)

    found = {}
    for name, model, of_model in (("ours", ours, our_cfg), ("detectron2", detectron2, cfg)):
        step = Step(model, of_model, inputs, stages, args.precision)
        found[f"training step, {name}"] = dearest(step, args.device)
        found[f"image, {name}"] = dearest(functools.partial(predict, model), args.device)
    for what, (total, rows) in sorted(found.items()):
        print(f"\n{what}: {total:.2f} ms in kernels\n")
        print(tabulate(rows, headers=["kernel", "calls", "ms"], tablefmt="pipe", floatfmt=".3f"))
    if args.json:
        content = {
            "environment": environment(args.device),
            "kernels": {
                what: {"total_ms": total, "dearest": rows} for what, (total, rows) in found.items()
            },
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def dearest(run: Callable[[], Any], device: torch.device) -> tuple[float, list[list[Any]]]:
    """Milliseconds in all kernels, and of the dearest the name, the calls and the milliseconds."""
    for _ in range(3):
        run()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    times = {
        event.key: (
            event.count,
            (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
            / 1000,
        )
        for event in profiler.key_averages()
    }
    ordered = sorted(times.items(), key=lambda item: -item[1][1])
    rows = [[name[:80], calls, round(ms, 3)] for name, (calls, ms) in ordered[:SHOWN]]
    return sum(ms for _, ms in times.values()), rows
