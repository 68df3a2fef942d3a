"""How many operators a training step and an image take, and how often the processor waits.

On a GPU every operator that is no view is a launch, and small batches are bound by them. On a CPU
they are counted with all switched off that is for CPUs alone.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torchvision
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from panoptic_fpn_ext.engine import Trainer
from panoptic_fpn_ext.modeling.postprocessing import PanopticPostprocessor

from .counted_kernels import as_kernels
from .frame import environment
from .inference import OUTPUT_CHOICES
from .models import SETTINGS, Batch, Scene, agreement, agrees, build_both, config

DETECTIONS = (0, 30, 100)
IMAGES = 2  # of a training step
WAITING_METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")
WAITING_OPERATORS = (
    "nms",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
)


class Counting(TorchDispatchMode):
    """Counts operators, and what makes the processor wait for a GPU, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "all"
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not (function.is_view or name in ("detach", "_unsafe_view", "empty", "lift_fresh")):
            self.operators[self.stage] += 1
        if name in WAITING_OPERATORS or (name.startswith("index") and _has_mask(args)):
            self.waits[self.stage] += 1
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def in_stage(self, name: str) -> Iterator[None]:
        before, self.stage = self.stage, name
        try:
            yield
        finally:
            self.stage = before

    @contextlib.contextmanager
    def launched(self) -> Iterator[None]:
        """Count one, and nothing meanwhile."""
        self.operators[self.stage] += 1
        operators, waits = self.operators.copy(), self.waits.copy()
        with _disable_current_modes():
            yield
        self.operators, self.waits = operators, waits

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is done meanwhile; waits also where they are methods of tensors."""
        with contextlib.ExitStack() as stack:
            inside = [False]

            def noted(method: Any) -> Any:
                def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                    first, inside[0] = not inside[0], True  # tolist calls item ...
                    self.waits[self.stage] += first
                    try:
                        return method(tensor, *args, **kwargs)
                    finally:
                        inside[0] = inside[0] and not first

                return call

            for name in WAITING_METHODS:
                method = getattr(torch.Tensor, name)
                stack.enter_context(mock.patch.object(torch.Tensor, name, noted(method)))
            stack.enter_context(self)
            yield


def _has_mask(args: tuple) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


ANSWERS = {
    "is_eager_on_cpu": False,
    "is_eager_on_cpu_in_any_precision": False,
    "is_eager_on_gpu": True,
}
"""Of the questions that our modules ask, as on a GPU."""


@contextlib.contextmanager
def as_on_a_gpu(device: torch.device, counting: Counting) -> Iterator[None]:
    """On a CPU, without the ways of computing that are for CPUs alone: ours, and torchvision's NMS
    class by class, which a GPU does not take for so few boxes. Our kernels count as one each."""
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            ours = [m for name, m in sys.modules.items() if name.startswith("panoptic_fpn_ext.")]
            for module in ours:
                for name, answer in ANSWERS.items():
                    if hasattr(module, name):
                        patch = mock.patch.object(module, name, lambda *x, answer=answer: answer)
                        stack.enter_context(patch)
            at_once = torchvision.ops.boxes._batched_nms_coordinate_trick
            stack.enter_context(
                mock.patch.object(torchvision.ops.boxes, "_batched_nms_vanilla", at_once)
            )
            stack.enter_context(as_kernels(counting.launched))
        yield


def training(models: dict[str, nn.Module], cfgs: dict[str, Any], device: torch.device) -> dict:
    """Operators of a step of each model, by stage."""
    scenes = [Scene(SETTINGS["coco"], 30, device, seed) for seed in range(IMAGES)]
    batch = [image for scene in scenes for image in scene.training_inputs()]
    counts = {}
    for name, model in models.items():
        model.train()
        build = Trainer.build_optimizer if name == "ours" else build_optimizer
        optimizer = build(cfgs[name], model)
        for group in optimizer.param_groups:
            group["foreach"] = True  # PyTorch's default on GPUs
        counting = Counting()
        for warm in (False, True):
            torch.manual_seed(0)
            context = counting.counting() if warm else contextlib.nullcontext()
            with EventStorage(), as_on_a_gpu(device, counting), context:
                with counting.in_stage("forward"):
                    losses = sum(model(batch).values())
                with counting.in_stage("backward"):
                    optimizer.zero_grad()
                    losses.backward()
                with counting.in_stage("optimizer"):
                    optimizer.step()
        counts[name] = counting
    return counts


def inference(
    models: dict[str, nn.Module], number: int, device: torch.device
) -> tuple[dict[str, Counting], bool]:
    """Operators of an image with ``number`` detections, by stage; whether the answers agree."""
    batch = Batch(SETTINGS["coco"], max(number, 1), device, 1)
    counts, answers = {}, []
    for name, model in models.items():
        model.eval()
        counting = Counting()
        for warm in (False, True):
            context = counting.counting() if warm else contextlib.nullcontext()
            with contextlib.ExitStack() as stack:
                if number:
                    stack.enter_context(batch.shown_to(model, _Stages(counting)))
                stack.enter_context(as_on_a_gpu(device, counting))
                stack.enter_context(torch.no_grad())
                stack.enter_context(context)
                answer = model(batch.inputs)
        counts[name] = counting
        answers.append(answer)
    same = not number or agrees(agreement(*answers), exact=True)
    return counts, same


class _Stages:
    """Tells the counter which stage begins."""

    def __init__(self, counting: Counting) -> None:
        self._counting = counting

    def enter(self, stage: str, *, part_of: str | None = None) -> None:
        self._counting.stage = stage


def launches(args: argparse.Namespace) -> int:
    """Print, and write as JSON, the counts of both models.

    Returns:
        The exit status: 1 if the answers differ.
    """
    cfg = config(SETTINGS["coco"], depth=50, device=args.device)
    detectron2, ours, our_cfg = build_both(cfg, args.opts)
    models = {"ours": ours, "detectron2": detectron2}
    our_cfg.MODEL.PANOPTIC_FPN.OUTPUTS = OUTPUT_CHOICES["panoptic_seg"]
    ours.postprocess = PanopticPostprocessor(our_cfg)
    found = {"training": training(models, {"ours": our_cfg, "detectron2": cfg}, args.device)}
    same_answer = True
    for number in DETECTIONS:
        found[f"inference, {number} detections"], same = inference(models, number, args.device)
        same_answer &= same
    rows, totals = [], {}
    for what, counts in found.items():
        stages = dict.fromkeys(stage for c in counts.values() for stage in c.operators)
        for kind in ("operators", "waits"):
            numbers = {name: getattr(c, kind) for name, c in counts.items()}
            total = {name: sum(n.values()) for name, n in numbers.items()}
            totals[what, kind] = total
            for stage in stages:
                if any(n[stage] for n in numbers.values()):
                    rows.append([what, stage, kind, *(n[stage] for n in numbers.values())])
            rows.append([what, "whole", kind, *total.values()])
    ratios = [f"{row[3] / row[4]:.2f}" if row[1] == "whole" and row[4] else "" for row in rows]
    headers = ["", "stage", "", "ours", "Detectron2", "ours / Detectron2"]
    table = [[*row, ratio] for row, ratio in zip(rows, ratios, strict=True)]
    print(tabulate(table, headers=headers, tablefmt="pipe"))
    if args.device.type == "cpu":
        print("\nCounted on a CPU, without what is for CPUs alone.")
    if args.json:
        last = f"inference, {DETECTIONS[-1]} detections"
        content = {
            "launches": {
                "training": totals["training", "operators"],
                "inference": totals[last, "operators"],
            },
            "waits": {"training": totals["training", "waits"], "inference": totals[last, "waits"]},
            "environment": environment(args.device),
            "same_answer": same_answer,
            "rows": [
                dict(zip(("what", "stage", "kind", *models), row, strict=True)) for row in rows
            ],
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if same_answer else 1
