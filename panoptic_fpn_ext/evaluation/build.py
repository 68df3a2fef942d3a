"""Which evaluators a dataset gets: those its metadata names, for what the model returns.

To add one, register a builder under its name and say which output of the model it reads::

    @EVALUATOR_REGISTRY.register()
    @needs("sem_seg")
    def cityscapes_sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
        return CityscapesSemSegEvaluator.from_dataset(dataset_name)

and name it in the dataset's metadata: ``evaluators=("panoptic_seg", "cityscapes_sem_seg")``. What
Detectron2 has in its place, if anything, is registered in ``detectron2_evaluators.py`` under the
same name; ``TEST.EVALUATORS`` chooses between the two.
"""

import difflib
from importlib import import_module
from importlib.util import find_spec

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..config import resolve_config
from ..errors import UserError
from . import detectron2_evaluators  # noqa: F401  (fills its registry)
from .base import ImageEvaluator
from .cityscapes_instances import CityscapesInstanceEvaluator
from .cityscapes_sem_seg import CityscapesSemSegEvaluator
from .independent import IndependentEvaluators
from .instance_ap import InstanceAPEvaluator
from .merging_losses import MergingThresholds
from .panoptic_quality import PanopticQualityEvaluator
from .pictures import PredictionPictures
from .registry import (
    DETECTRON2_EVALUATOR_REGISTRY,
    EVALUATOR_REGISTRY,
    EvaluatorBuilder,
    needs,
)
from .report import ReportWriter
from .score_names import (
    BOUNDARY_SCORES,
    CITYSCAPES_INSTANCE_SCORES,
    CITYSCAPES_SEM_SEG_SCORES,
    INSTANCE_SCORES,
    PANOPTIC_SCORES,
    SEM_SEG_SCORES,
)
from .sem_seg_iou import SemSegIoUEvaluator
from .submission import PanopticSubmissionWriter

REGISTRIES = {
    "panoptic_fpn_ext": EVALUATOR_REGISTRY,
    "detectron2": DETECTRON2_EVALUATOR_REGISTRY,
}
"""The values of ``TEST.EVALUATORS``."""

DEFAULT_EVALUATORS = ("panoptic_seg", "sem_seg", "instances")
"""What a dataset is evaluated with whose metadata does not say."""


@EVALUATOR_REGISTRY.register()
@needs("panoptic_seg", scores=PANOPTIC_SCORES)
def panoptic_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return PanopticQualityEvaluator.from_dataset(dataset_name)


@EVALUATOR_REGISTRY.register()
@needs("sem_seg", scores=SEM_SEG_SCORES)
def sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return SemSegIoUEvaluator.from_dataset(dataset_name)


@EVALUATOR_REGISTRY.register()
@needs("instances", scores=INSTANCE_SCORES)
def instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return InstanceAPEvaluator.from_dataset(dataset_name, output_folder)


@EVALUATOR_REGISTRY.register()
@needs("sem_seg", scores=(*SEM_SEG_SCORES, *CITYSCAPES_SEM_SEG_SCORES))
def cityscapes_sem_seg(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator.from_dataset(dataset_name)


@EVALUATOR_REGISTRY.register()
@needs("instances", scores=CITYSCAPES_INSTANCE_SCORES)
def cityscapes_instances(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator.from_dataset(dataset_name)


def evaluator_builders(cfg: CfgNode, dataset_name: str) -> list[EvaluatorBuilder]:
    """The builders of a dataset's evaluators for the outputs of the model.

    Args:
        cfg: ``TEST.EVALUATORS`` says whose evaluators, ``MODEL.PANOPTIC_FPN.OUTPUTS`` what the
            model returns.
        dataset_name: its ``evaluators`` metadata says what can be evaluated on it.

    Raises:
        UserError: a key or a name with no evaluator behind it, or a package that one needs and
            that is not installed.
    """
    choice, outputs = cfg.TEST.EVALUATORS, cfg.MODEL.PANOPTIC_FPN.OUTPUTS
    if choice not in REGISTRIES:
        raise UserError(f"TEST.EVALUATORS {choice!r}: allowed are {list(REGISTRIES)}")
    builders = []
    for name in MetadataCatalog.get(dataset_name).get("evaluators", DEFAULT_EVALUATORS):
        if name not in REGISTRIES[choice]:
            raise UserError(
                f"dataset {dataset_name!r}: no evaluator {name!r} in {choice}; it has "
                f"{[known for known, _ in REGISTRIES[choice]]}"
            )
        build = REGISTRIES[choice].get(name)
        if build.needs not in outputs:
            continue
        if build.module and not _is_there(build.module, build.attribute):
            what = f"{build.module}.{build.attribute}" if build.attribute else build.module
            raise UserError(
                f"TEST.EVALUATORS {choice}: {name} needs {what}, which is not installed: "
                f"{build.install}, or choose TEST.EVALUATORS panoptic_fpn_ext"
            )
        builders.append(build)
    if cfg.TEST.SUBMISSION and "panoptic_seg" not in outputs:
        raise UserError(
            f"TEST.SUBMISSION needs panoptic_seg in MODEL.PANOPTIC_FPN.OUTPUTS, now {outputs}"
        )
    return builders


def check_score_name(cfg: CfgNode, name: str) -> None:
    """
    Args:
        cfg: the config of a run, resolved.
        name: of a score, as in ``metrics.json``.

    Raises:
        UserError: no evaluation of the run finds it; where an evaluator does not say what it finds,
            nothing is refused.
    """
    known: list[str] = []
    for dataset in cfg.DATASETS.TEST:
        names = ["validation/total_loss", "validation/loss_"] if cfg.TEST.LOSS else []
        for build in evaluator_builders(cfg, dataset):
            scores = getattr(build, "scores", None)
            if scores is None:
                return
            names += scores
            if cfg.TEST.BOUNDARY_PQ and scores == PANOPTIC_SCORES:
                names += BOUNDARY_SCORES
        prefix = f"{dataset}/" if len(cfg.DATASETS.TEST) > 1 else ""
        known += [prefix + score for score in names if cfg.MODEL.MASK_ON or "segm/" not in score]
    if any(name == score or (score[-1] in "-_" and name.startswith(score)) for score in known):
        return
    close = [score for score in known if f"/{score}".lower().endswith(f"/{name}".lower())]
    close += difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    reason = "of which DATASETS.TEST is empty"
    if "validation/" in name and not cfg.TEST.LOSS:
        reason = "which TEST.LOSS True computes"
    elif close:
        reason = f"did you mean {close[0]}?"
    raise UserError(f"TEST.BEST_METRIC {name!r}: no evaluation of this run finds it; {reason}")


def _is_there(module: str, attribute: str | None) -> bool:
    if find_spec(module) is None:
        return False
    return attribute is None or hasattr(import_module(module), attribute)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> IndependentEvaluators:
    """The evaluators of a dataset, and with ``TEST.SUBMISSION`` what writes the submission; with
    ``TEST.PICTURES`` what draws in trainings.

    One that fails is left out: its error is logged and in ``failures``.

    Args:
        cfg, dataset_name: see :func:`evaluator_builders`; of the outputs in ``cfg`` those count
            that the model can return.
        output_folder: where evaluators write what they keep.
    """
    cfg = resolve_config(cfg)
    evaluators = [
        build(dataset_name, output_folder) for build in evaluator_builders(cfg, dataset_name)
    ]
    for evaluator in evaluators:
        if isinstance(evaluator, ImageEvaluator):
            evaluator.scores_intervals = cfg.TEST.INTERVALS
        if isinstance(evaluator, PanopticQualityEvaluator):
            evaluator.boundary = cfg.TEST.BOUNDARY_PQ
    if cfg.TEST.REPORT and any(isinstance(e, PanopticQualityEvaluator) for e in evaluators):
        ours = [e for e in evaluators if isinstance(e, ImageEvaluator)]
        # After those whose results it shows.
        evaluators.append(
            ReportWriter(
                folder=output_folder,
                dataset_name=dataset_name,
                evaluators=ours,
                cfg=cfg,
                merging=MergingThresholds.of_config(cfg),
            )
        )
    if cfg.TEST.SUBMISSION:
        # Before the others, because Detectron2's evaluators change the predictions.
        evaluators.insert(0, PanopticSubmissionWriter.from_dataset(dataset_name, output_folder))
    if cfg.TEST.PICTURES:
        evaluators.insert(0, PredictionPictures.from_config(cfg, dataset_name))
    return IndependentEvaluators(evaluators)
