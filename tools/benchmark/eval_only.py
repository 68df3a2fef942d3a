"""The whole of ``--eval-only`` with trained weights: loading, network, merging and evaluation."""

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model

from panoptic_fpn_ext.engine import Trainer, setup
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer

from .dataset import convert_for_detectron2
from .evaluation import EVALUATORS, quiet
from .frame import by_turns
from .results import Comparison, Peer, Times

TOLERANCE = 0.05
"""Points by which the scores may differ."""
SCORES = ("PQ", "PQ_th", "PQ_st", "mIoU", "fwIoU", "AP", "AP50")


def eval_only(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """For each dataset of a config, the built-in model with Detectron2's evaluators against ours.

    Both models have the same weights. What Detectron2's evaluators want converted before (semantic
    PNGs, instance annotations) is not timed.
    """
    cfg = setup(
        argparse.Namespace(config_file=args.config_file, opts=args.opts, eval_only=True, resume=0)
    )
    detectron2_cfg = cfg.clone()
    detectron2_cfg.defrost()
    detectron2_cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    detectron2_cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    models = []
    for model_cfg in (cfg, detectron2_cfg):
        models.append(build_model(model_cfg).eval())
        PanopticFPNCheckpointer(models[-1]).load(cfg.MODEL.WEIGHTS)
    return [compare(name, cfg, *models, args.rounds) for name in cfg.DATASETS.TEST], []


def compare(
    name: str, cfg: CfgNode, ours: torch.nn.Module, detectron2: torch.nn.Module, rounds: int
) -> Comparison:
    """One dataset, from its files to its scores."""
    our_evaluators, their_evaluators = EVALUATORS["PQ + mIoU + AP"]
    with tempfile.TemporaryDirectory() as folder:
        converted = f"{name} for Detectron2's evaluators"
        records = convert_for_detectron2(name, converted, Path(folder))

        def run_ours() -> Mapping[str, Mapping[str, float]]:
            loader = Trainer.build_test_loader(cfg, name)
            return inference_on_dataset(ours, loader, our_evaluators(name))

        def run_detectron2() -> Mapping[str, Mapping[str, float]]:
            loader = build_detection_test_loader(cfg, converted)
            return inference_on_dataset(detectron2, loader, their_evaluators(converted))

        first, turns = by_turns(
            [functools.partial(timed, run_ours), functools.partial(timed, run_detectron2)], rounds
        )
        DatasetCatalog.remove(converted)
        MetadataCatalog.remove(converted)
    found, expected = (scores for _, scores in first)
    differences = {
        f"{key}_difference": difference(found[key], expected[key])
        for key in found.keys() & expected.keys()
        if key.split("/")[-1] in SCORES
    }
    ours_ms, detectron2_ms = (Times.of([s for s, _ in turn], len(records)) for turn in turns)
    return Comparison(
        what="eval-only",
        size=f"{name}, {len(records)} images",
        ours_ms=ours_ms,
        detectron2_ms=detectron2_ms,
        same_answer=bool(differences) and max(differences.values()) <= TOLERANCE,
        agreement=differences,
    )


def difference(a: float, b: float) -> float:
    """Of two scores; no score is like another such."""
    return 0.0 if math.isnan(a) and math.isnan(b) else abs(float(a) - float(b))


def timed(
    run: Callable[[], Mapping[str, Mapping[str, float]]],
) -> tuple[float, dict[str, float]]:
    """Seconds, and the scores."""
    start = time.perf_counter()
    with quiet():
        scores = run()
    return time.perf_counter() - start, flatten_results_dict(scores)
