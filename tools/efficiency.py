#!/usr/bin/env python
"""Count what backbones for features of higher resolution cost, and one network against two.

    python tools/efficiency.py --backbone R101 --size 1024 2048 --json out.json --plot out.png

Multiply-adds and activations (outputs) of all convolutions and matrix products, by fvcore's
counters, for one image; normalization, pooling, interpolation and other element-wise operators
are not counted. docs/EFFICIENCY.md says what belongs to what.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import matplotlib
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
    build_sem_seg_head,
)
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from tabulate import tabulate
from torch import nn

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "backbones"
BACKBONES = ("fpn", "dilation_16", "dilation_8", "symmetric")
PANOPTIC_FPN = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
DEPTHS = {"R50": 50, "R101": 101}
TILE = 32  # pixels; no stride is larger, but that of p6
RATIOS = (("fpn", "dilation_16"), ("symmetric", "fpn"), ("dilation_8", "fpn"))


@dataclass
class Cost:
    """Multiply-adds and activations; operators that were met and not counted."""

    multiply_adds: int = 0
    activations: int = 0
    not_counted: set[str] = field(default_factory=set)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.activations + other.activations,
            self.not_counted | other.not_counted,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.multiply_adds * times, self.activations * times, self.not_counted)


class Call(nn.Module):
    """A function of a module's as a module that returns tensors, which is what can be traced."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        outputs = self.function(*tensors)
        if isinstance(outputs, dict):
            outputs = outputs.values()
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def count(module: nn.Module, *inputs: torch.Tensor, function: Callable | None = None) -> Cost:
    """The cost of ``function(*inputs)``, one of ``module``, or of ``module`` itself."""
    call = Call(module, function or module).eval()
    activations = ActivationCountAnalysis(call, inputs)
    multiply_adds = FlopCountAnalysis(call, inputs)
    for analysis in (activations, multiply_adds):
        analysis.unsupported_ops_warnings(False)
        analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        operators = activations.by_operator()
        by_operator = multiply_adds.by_operator()
    return Cost(
        # fvcore estimates some of the other operators, too: both are sums over the same.
        multiply_adds=int(sum(by_operator[name] for name in operators)),
        activations=int(sum(operators.values())),
        not_counted=set(activations.unsupported_ops()),
    )


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters are not initialized, which takes most of the time otherwise."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")


def backbone_config(name: str, depth: int) -> CfgNode:
    """``configs/backbones/{name}.yaml`` with a ResNet of ``depth`` layers."""
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.RESNETS.DEPTH = depth
    return cfg


def backbone_cost(backbone: nn.Module, size: tuple[int, int]) -> Cost:
    """The cost for an image of ``size``, multiples of ``TILE``.

    All its layers are convolutions, so that it is proportional to the area: one tile is traced.
    """
    tiles = size[0] // TILE * (size[1] // TILE)
    return count(backbone, torch.zeros(1, 3, TILE, TILE)) * tiles


def compare_backbones(depth: int, size: tuple[int, int]) -> dict[str, dict]:
    """Of each backbone: output stride, parameters, multiply-adds, activations, not_counted."""
    rows = {}
    for name in BACKBONES:
        cfg = backbone_config(name, depth)
        backbone = without_weights(lambda cfg=cfg: build_backbone(cfg))
        rows[name] = {
            "output_stride": min(shape.stride for shape in backbone.output_shape().values()),
            "parameters": sum(p.numel() for p in backbone.parameters()),
            **asdict(backbone_cost(backbone, size)),
        }
    return rows


def panoptic_fpn_parts(depth: int, size: tuple[int, int]) -> dict[str, Cost]:
    """Of each part of Detectron2's COCO Panoptic FPN in inference, at the most boxes it allows."""
    cfg = model_zoo.get_config(PANOPTIC_FPN)
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 54, 80
    backbone = without_weights(lambda: build_backbone(cfg))
    shapes = backbone.output_shape()
    sem_seg = without_weights(lambda: build_sem_seg_head(cfg, shapes))
    rpn = without_weights(lambda: build_proposal_generator(cfg, shapes)).rpn_head
    roi = without_weights(lambda: build_roi_heads(cfg, shapes))

    tiles = size[0] // TILE * (size[1] // TILE)
    levels = {
        name: one_map(shapes[name], TILE // shapes[name].stride) for name in sem_seg.in_features
    }
    positions = sum(
        math.prod(math.ceil(side / shapes[name].stride) for side in size)
        for name in cfg.MODEL.RPN.IN_FEATURES
    )
    level = shapes[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]]
    box = one_map(level, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)
    mask = one_map(level, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION)
    return {
        "backbone and FPN": backbone_cost(backbone, size),
        "semantic head": count(
            sem_seg,
            *levels.values(),
            function=lambda *maps: sem_seg.layers(dict(zip(levels, maps, strict=True))),
        )
        * tiles,
        "RPN": count(rpn, one_map(level, 1), function=lambda x: chain(*rpn([x]))) * positions,
        "box head": count(roi, box, function=lambda x: roi.box_predictor(roi.box_head(x)))
        * cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
        "mask head": count(roi, mask, function=roi.mask_head.layers)
        * cfg.TEST.DETECTIONS_PER_IMAGE,
    }


def one_map(shape: ShapeSpec, side: int) -> torch.Tensor:
    return torch.zeros(1, shape.channels, side, side)


def compare_networks(depth: int, size: tuple[int, int]) -> dict[str, dict]:
    """One Panoptic FPN against Mask R-CNN and Semantic FPN, each with a backbone of its own."""
    parts = panoptic_fpn_parts(depth, size)
    semantic = parts["backbone and FPN"] + parts["semantic head"]
    instance = sum((cost for name, cost in parts.items() if name != "semantic head"), Cost())
    costs = {
        **parts,
        "Mask R-CNN": instance,
        "Semantic FPN": semantic,
        "two networks": instance + semantic,
        "Panoptic FPN": sum(parts.values(), Cost()),
    }
    return {name: asdict(cost) for name, cost in costs.items()}


def ratios(backbones: dict[str, dict], networks: dict[str, dict]) -> dict[str, dict[str, float]]:
    return {
        what: {
            **{f"{a}/{b}": backbones[a][what] / backbones[b][what] for a, b in RATIOS},
            "panoptic_fpn/two_networks": networks["Panoptic FPN"][what]
            / networks["two networks"][what],
        }
        for what in ("multiply_adds", "activations")
    }


def draw(backbones: dict[str, dict], title: str, path: Path) -> None:
    """The paper's comparison: compute against memory, a point for each backbone."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for name, row in backbones.items():
        x, y = row["activations"] / 1e6, row["multiply_adds"] / 1e9
        axes.plot(x, y, "o")
        axes.annotate(
            f"{name.replace('_', '-')} (1/{row['output_stride']})",
            (x, y),
            textcoords="offset points",
            # fpn and dilation-16 almost coincide.
            xytext=(6, -12) if name == "dilation_16" else (6, 4),
        )
    axes.set(xlabel="activations (millions)", ylabel="multiply-adds (billions)", title=title)
    axes.set(xlim=(0, 1.35 * axes.get_xlim()[1]), ylim=(0, 1.1 * axes.get_ylim()[1]))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(result: dict) -> str:
    """The tables, as Markdown."""
    backbones, networks = result["backbones"], result["networks"]
    units = ("multiply-adds (G)", "activations (M)")
    first = tabulate(
        [
            (
                name.replace("_", "-"),
                f"1/{row['output_stride']}",
                row["parameters"] / 1e6,
                *_amounts(row, backbones["fpn"]),
            )
            for name, row in backbones.items()
        ],
        ("backbone", "output", "parameters (M)", *units, *(f"{u[:-4]} / fpn" for u in units)),
        tablefmt="github",
        floatfmt=("", "", ".1f", ".1f", ".1f", ".2f", ".2f"),
    )
    second = tabulate(
        [(name, *_amounts(row, networks["two networks"])) for name, row in networks.items()],
        ("network or part", *units, *(f"{u[:-4]} / two" for u in units)),
        tablefmt="github",
        floatfmt=("", ".1f", ".1f", ".2f", ".2f"),
    )
    return f"{first}\n\n{second}"


def _amounts(row: dict, reference: dict) -> tuple[float, ...]:
    """Multiply-adds in billions, activations in millions, and both over those of another row."""
    multiply_adds, activations = row["multiply_adds"], row["activations"]
    return (
        multiply_adds / 1e9,
        activations / 1e6,
        multiply_adds / reference["multiply_adds"],
        activations / reference["activations"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=DEPTHS, default="R101")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(1024, 2048),
        metavar=("H", "W"),
        help="of the image, in pixels; made multiples of 32, as images are padded to",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts and ratios")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw compute against memory")
    args = parser.parse_args()
    if min(args.size) < 1:
        raise UserError(f"--size {args.size[0]} {args.size[1]}: both must be at least 1")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}")

    height, width = (math.ceil(side / TILE) * TILE for side in args.size)
    depth = DEPTHS[args.backbone]
    result = {
        "backbone": args.backbone,
        "size": [height, width],
        "backbones": compare_backbones(depth, (height, width)),
        "networks": compare_networks(depth, (height, width)),
    }
    result["ratios"] = ratios(result["backbones"], result["networks"])
    rows = [*result["backbones"].values(), *result["networks"].values()]
    result["not_counted"] = sorted(set().union(*(row.pop("not_counted") for row in rows)))

    title = f"{args.backbone}, {height} × {width} pixels"
    print(f"{title}\n\n{report(result)}\n")
    print(f"not counted: {', '.join(result['not_counted'])}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        draw(result["backbones"], title, args.plot)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"efficiency.py: error: {error}", file=sys.stderr)
        sys.exit(2)
