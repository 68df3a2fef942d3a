"""Panoptic FPN (Kirillov, Girshick, He, Dollár, CVPR 2019) as a Detectron2 extension.

Importing this package registers its datasets, heads and meta-architectures with Detectron2.
"""

import os
import sys

# Threads of PyTorch that wait for each other on a CPU sleep, as long as nobody wants them to spin:
# beside other work, training takes a sixth of the time then. Read when PyTorch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import detectron2.config  # noqa: F401  an emptied folder imports as `detectron2` too
except ImportError as error:
    raise ImportError(
        f"panoptic_fpn_ext needs a working Detectron2 ({error}): run "
        "`python tools/install_detectron2.py` from a clone of panoptic_fpn_ext, or build "
        "Detectron2 from its source."
    ) from error

from . import data, modeling
from .config import add_panoptic_fpn_config
from .data import PanopticFPNMapper, register_panoptic_dataset
from .errors import UserError
from .evaluation import PanopticQualityEvaluator, SemSegIoUEvaluator, build_evaluator
from .modeling import accelerate, decelerate
from .prediction import Predictor, write_instance_results, write_panoptic_results

__version__ = "0.1.0"

__all__ = [
    "PanopticFPNMapper",
    "PanopticQualityEvaluator",
    "Predictor",
    "SemSegIoUEvaluator",
    "UserError",
    "accelerate",
    "add_panoptic_fpn_config",
    "build_evaluator",
    "data",
    "decelerate",
    "modeling",
    "register_panoptic_dataset",
    "write_instance_results",
    "write_panoptic_results",
]
