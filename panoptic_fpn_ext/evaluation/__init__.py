"""Streaming evaluation: panoptic quality, semantic IoU, and what a dataset is evaluated with."""

from .build import EVALUATOR_REGISTRY, build_evaluator
from .panoptic_quality import PanopticQualityEvaluator
from .sem_seg_iou import SemSegIoUEvaluator

__all__ = [
    "EVALUATOR_REGISTRY",
    "PanopticQualityEvaluator",
    "SemSegIoUEvaluator",
    "build_evaluator",
]
