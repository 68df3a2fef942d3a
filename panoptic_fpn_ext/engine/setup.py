"""From command line arguments to a config that is known to work, before anything is written."""

import argparse
import difflib
import importlib.util
import logging
import os
import re
from collections.abc import Iterable
from functools import partial

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from ..config import OUTPUTS, add_panoptic_fpn_config, resolve_config
from ..config_differences import flat, note_origin
from ..data import register_datasets_of_config
from ..data.category_lines import first_difference
from ..data.records import check_files
from ..errors import UserError
from ..evaluation import check_score_name, evaluator_builders
from .run_folder import check_writable, checkpoints_in
from .tracking import check_writer
from .trainer import optimizer_named

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a run.

    Args:
        args: those of Detectron2's ``default_argument_parser``.

    Raises:
        UserError: a missing config, dataset or checkpoint, an unknown key, a value of the wrong
            type.
    """
    cfg = _read(args.config_file, args.opts)
    if args.eval_only or cfg.DATASETS.TEST:
        _check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    else:
        logger.warning("DATASETS.TEST is empty: training without evaluation")
    if not args.eval_only:
        _check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
        optimizer_named(cfg.SOLVER.OPTIMIZER)
        _check_curves(cfg)
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only and not weights and not args.resume:
        raise UserError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume")
    if args.eval_only and args.resume and not checkpoints_in(cfg.OUTPUT_DIR):
        raise UserError(
            f"--eval-only --resume: OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint; to evaluate a "
            "file, MODEL.WEIGHTS FILE without --resume"
        )
    if cfg.SOLVER.AMP.ENABLED and not args.eval_only and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError("SOLVER.AMP.ENABLED needs a GPU: set it to False")
    _check_batch(cfg, args)
    cfg = resolve_config(cfg)
    for name in cfg.DATASETS.TEST:
        if not evaluator_builders(cfg, name) and not cfg.TEST.SUBMISSION:
            raise UserError(
                f"DATASETS.TEST: on {name!r} nothing of MODEL.PANOPTIC_FPN.OUTPUTS "
                f"{cfg.MODEL.PANOPTIC_FPN.OUTPUTS} is evaluated; TEST.SUBMISSION True writes "
                "predictions for a test server"
            )
        if cfg.TEST.LOSS:
            _check_ground_truth(cfg, name)
    if not args.eval_only:
        _check_what_is_kept(cfg)
    if args.eval_only or args.resume:
        _check_trained_classes(cfg, cfg.OUTPUT_DIR if args.resume else os.path.dirname(weights))
    if not args.eval_only:
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            check_files(DatasetCatalog.get(name), name)
    check_writable(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def setup_prediction(config_file: str, opts: list[str], *, dataset: str | None = None) -> CfgNode:
    """The frozen config of a trained network that gives panoptic maps, of which nothing is scored.

    Args:
        config_file: of the network.
        opts: options KEY VALUE; ``MODEL.PANOPTIC_FPN.OUTPUTS`` is left to the caller.
        dataset: what to predict on in place of the first of ``DATASETS.TEST``.

    Raises:
        UserError: as :func:`setup`; also a network that gives no panoptic maps.
    """
    cfg = _read(config_file, opts)
    if dataset:
        cfg.DATASETS.TEST = (dataset,)
    _check_datasets(cfg.DATASETS.TEST, "--dataset" if dataset else "DATASETS.TEST")
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights to predict with: add MODEL.WEIGHTS FILE")
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = list(OUTPUTS)
    cfg = resolve_config(cfg)
    if "panoptic_seg" not in cfg.MODEL.PANOPTIC_FPN.OUTPUTS:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} does not give panoptic maps: "
            "PanopticFPNExt does"
        )
    _check_trained_classes(cfg, os.path.dirname(cfg.MODEL.WEIGHTS))
    cfg.freeze()
    return cfg


def setup_trained(config_file: str, opts: list[str]) -> CfgNode:
    """The frozen config of a trained network, with its outputs; its datasets need not be here.

    Args:
        config_file, opts: see :func:`setup_prediction`.

    Raises:
        UserError: as :func:`setup`.
    """
    cfg = _read(config_file, opts)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights: add MODEL.WEIGHTS FILE")
    cfg = resolve_config(cfg)
    _check_trained_classes(cfg, os.path.dirname(cfg.MODEL.WEIGHTS))
    cfg.freeze()
    return cfg


def _read(config_file: str, opts: list[str]) -> CfgNode:
    """A config from a file and options KEY VALUE, its datasets registered."""
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    if not config_file:
        raise UserError("--config-file is needed, for instance configs/quickstart.yaml")
    if not os.path.isfile(config_file):
        raise UserError(f"--config-file {config_file}: no such file")
    if flags := [option for option in opts if option.startswith("--")]:
        raise UserError(f"{flags[0]} after KEY VALUE pairs: it has to come before them")
    if len(opts) % 2:
        raise UserError(f"options come as pairs KEY VALUE, got: {' '.join(opts)}")
    # By default Detectron2 runs what a config says in Python tags.
    _merge(cfg, config_file, lambda: cfg.merge_from_file(config_file, allow_unsafe=False))
    in_file = cfg.clone()
    for k in range(0, len(opts), 2):
        _merge(cfg, "the command line", partial(cfg.merge_from_list, opts[k : k + 2]))
    note_origin(cfg, config_file, in_file, opts[::2])
    architecture, weights = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS
    if architecture not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {architecture!r} is not registered"
            f"{_did_you_mean(architecture, [k for k, _ in META_ARCH_REGISTRY])}"
        )
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise UserError(f"MODEL.WEIGHTS {weights}: no such file")
    _choose_device(cfg, opts)
    register_datasets_of_config(cfg)
    return cfg


def _check_trained_classes(cfg: CfgNode, folder: str) -> None:
    """Raise UserError if the config beside a checkpoint has other classes, be they as many."""
    path = os.path.join(folder, "config.yaml")
    try:
        with open(path) as file:
            theirs = yaml.safe_load(file)["MODEL"]["CATEGORIES"]
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        return  # no config, or not one of ours
    ours = cfg.MODEL.CATEGORIES
    if ours and theirs and (difference := first_difference(ours, theirs)):
        raise UserError(
            f"{path}: trained on other classes than those of {', '.join(cfg.DATASETS.TEST)}: "
            f"{difference} there"
        )


def _check_ground_truth(cfg: CfgNode, name: str) -> None:
    """Raise UserError if a dataset has nothing to compute losses against."""
    record = DatasetCatalog.get(name)[0]
    ways = [{"pan_seg_file_name"}, {"annotations", "sem_seg_file_name"}]
    if cfg.MODEL.META_ARCHITECTURE == "SemanticFPN":
        ways[1].remove("annotations")
    elif cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        ways[1].remove("sem_seg_file_name")
    if not any(way <= record.keys() for way in ways):
        raise UserError(
            f"TEST.LOSS: dataset {name!r} has no ground truth for "
            f"{cfg.MODEL.META_ARCHITECTURE}: set TEST.LOSS False, or leave it out of DATASETS.TEST"
        )


def _check_what_is_kept(cfg: CfgNode) -> None:
    """Raise UserError for numbers that are none, and for a score that nothing will find."""
    for key, value in (
        ("SOLVER.CHECKPOINT_KEEP", cfg.SOLVER.CHECKPOINT_KEEP),
        ("TEST.PATIENCE", cfg.TEST.PATIENCE),
    ):
        if value < 0:
            raise UserError(f"{key} {value}: must be 0 or more")
    if cfg.TEST.BEST_METRIC:
        check_score_name(cfg, cfg.TEST.BEST_METRIC)


def _check_curves(cfg: CfgNode) -> None:
    """Raise UserError for a package of curves that is not there, and for less than no pictures."""
    if importlib.util.find_spec("tensorboard") is None:  # which Detectron2's trainer needs
        raise UserError("tensorboard is not installed: pip install tensorboard")
    check_writer(cfg.TRACKING.WRITER)
    if cfg.TEST.PICTURES < 0:
        raise UserError(f"TEST.PICTURES {cfg.TEST.PICTURES}: must be 0 or more")


def _check_batch(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise UserError if the processes cannot share the images of a batch."""
    processes = getattr(args, "num_gpus", 1) * getattr(args, "num_machines", 1)
    batch = cfg.SOLVER.IMS_PER_BATCH
    if not args.eval_only and (batch < 1 or batch % processes):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} is not a multiple of the {processes} processes "
            "(--num-gpus or --nproc-per-node, times the machines)"
        )


def _choose_device(cfg: CfgNode, options: list[str]) -> None:
    """Run on the CPU where there is no GPU, unless the command line asks for one."""
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is no device: cuda, or cpu") from error
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return
    if "MODEL.DEVICE" in options[::2]:
        raise UserError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: PyTorch finds no GPU; set it to cpu")
    logger.warning("PyTorch finds no GPU: MODEL.DEVICE %s becomes cpu", cfg.MODEL.DEVICE)
    cfg.MODEL.DEVICE = "cpu"


def _merge(cfg: CfgNode, source: str, merge) -> None:
    """Call ``merge``; what it cannot take becomes one line that names ``source``.

    Nor can a key that is something become None, but NORM, which Detectron2's layers take so: yacs
    would take any value after that.
    """
    before = flat(cfg)
    try:
        merge()
    except (KeyError, AssertionError, ValueError, TypeError, OSError, yaml.YAMLError) as error:
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        hint = ""
        if "Non-existent" in message:  # yacs: "Non-existent config key: MODEL.WEIGHT"
            hint = _did_you_mean(message.rpartition(": ")[2], list(flat(cfg)))
        elif mismatch := re.search(
            r"with values \((.*) vs\. (.*)\) for config key: (.*)$", message
        ):
            expected, found, key = mismatch.groups()
            message = f"{key} is {found}, expected something like {expected}"
            if "<class 'tuple'>" in str(error):
                hint = '; in YAML a list, or with a comma even for one: ("shapes_train",)'
        raise UserError(f"{source}: {message}{hint}") from error
    for key, value in flat(cfg).items():
        if value is None and before.get(key) is not None and not key.endswith("NORM"):
            raise UserError(f"{source}: {key} is None, expected something like {before[key]!r}")


def _check_datasets(names: Iterable[str], key: str) -> None:
    if not names:
        raise UserError(f"{key} is empty: name a dataset")
    for name in names:
        if name not in DatasetCatalog.list():
            hint = _did_you_mean(name, DatasetCatalog.list()) or (
                "; DATASETS.PANOPTIC registers one of your own (docs/DATASETS.md)"
            )
            raise UserError(f"{key}: no dataset {name!r} is registered{hint}")
        metadata = MetadataCatalog.get(name)
        known = metadata.as_dict()
        if key == "DATASETS.TRAIN" and "panoptic_json" in known and "panoptic_root" not in known:
            raise UserError(f"{key}: dataset {name!r} is images alone, without annotations")
        for attribute in ("image_root", "panoptic_root", "panoptic_json", "json_file"):
            path = known.get(attribute)
            if path and not os.path.exists(path):
                raise UserError(
                    f"{key}: dataset {name!r} lacks {path}: see datasets/README.md, and set "
                    "DETECTRON2_DATASETS if your data is elsewhere"
                )


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
