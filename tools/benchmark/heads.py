"""A training step of the semantic head alone."""

import argparse
import functools

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.structures import ImageList
from efficiency import count, one_map
from torch import nn

from .frame import MB, Stages, by_turns
from .models import Scene, Setting, build_both
from .precision import autocast, tolerance
from .results import Comparison, Times


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
