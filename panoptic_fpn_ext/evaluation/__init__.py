"""Streaming evaluation: panoptic quality, semantic IoU, instance AP, submissions, and what a
dataset is evaluated with."""

from .base import ImageEvaluator
from .build import build_evaluator, check_score_name, evaluator_builders
from .cityscapes_instances import CityscapesInstanceEvaluator
from .cityscapes_sem_seg import CityscapesSemSegEvaluator
from .independent import EvaluationUserError, IndependentEvaluators
from .instance_ap import InstanceAPEvaluator
from .panoptic_quality import PanopticQualityEvaluator
from .registry import DETECTRON2_EVALUATOR_REGISTRY, EVALUATOR_REGISTRY, needs
from .report import ReportWriter
from .sem_seg_iou import SemSegIoUEvaluator
from .submission import PanopticSubmissionWriter

__all__ = [
    "DETECTRON2_EVALUATOR_REGISTRY",
    "EVALUATOR_REGISTRY",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "EvaluationUserError",
    "ImageEvaluator",
    "IndependentEvaluators",
    "InstanceAPEvaluator",
    "PanopticQualityEvaluator",
    "PanopticSubmissionWriter",
    "ReportWriter",
    "SemSegIoUEvaluator",
    "build_evaluator",
    "check_score_name",
    "evaluator_builders",
    "needs",
]
