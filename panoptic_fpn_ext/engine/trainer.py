"""Detectron2's trainer, for panoptic datasets and for machines without a GPU."""

import json
import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluators
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from ..data import PanopticFPNMapper
from ..errors import UserError
from ..evaluation import build_evaluator
from .checkpoint import PanopticFPNCheckpointer

# What a user can put right is said once, at the end, without a traceback.
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], UserError))
)

OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}


def optimizer_named(name: str) -> type[torch.optim.Optimizer]:
    """The class of a ``SOLVER.OPTIMIZER``.

    Raises:
        UserError: there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER {name!r}: allowed are {list(OPTIMIZERS)}")
    return OPTIMIZERS[name]


class Trainer(DefaultTrainer):
    """Trains on any panoptic dataset, on GPUs or CPUs, and writes the scores as JSON."""

    def __init__(self, cfg: CfgNode) -> None:
        # As DefaultTrainer's, but its data parallel model wants a GPU.
        TrainerBase.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        ddp_args: dict[str, Any] = {"broadcast_buffers": False}
        if not next(model.parameters()).is_cuda:
            ddp_args["device_ids"] = None
        if cfg.MODEL.PANOPTIC_FPN.TRAINING == "alternate":
            ddp_args["find_unused_parameters"] = True  # those of the other task
        model = create_ddp_model(model, **ddp_args)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = PanopticFPNCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer ``SOLVER.OPTIMIZER`` names."""
        optimizer_class = optimizer_named(cfg.SOLVER.OPTIMIZER)
        if optimizer_class is torch.optim.SGD:
            return super().build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, optimizer_class)
        return optimizer(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=True
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=PanopticFPNMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = PanopticFPNMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        return build_evaluator(cfg, dataset_name, _inference_folder(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate, and write all scores to ``OUTPUT_DIR/inference/metrics.json``.

        Returns:
            The scores, as :meth:`DefaultTrainer.test`.
        """
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            folder = os.path.join(cfg.OUTPUT_DIR, "inference")
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, "metrics.json")
            scores = flatten_results_dict(results)
            with open(path, "w") as file:  # nan is not JSON
                json.dump({k: None if v != v else v for k, v in scores.items()}, file, indent=2)
            logging.getLogger(__name__).info("Scores written to %s", path)
        return results


def _inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where evaluators write: a folder of its own for each of several datasets."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return folder if len(cfg.DATASETS.TEST) == 1 else os.path.join(folder, dataset_name)
