"""Detectron2's trainer, for panoptic datasets and for machines without a GPU."""

import errno
import json
import logging
import os
import re
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.build import _test_loader_from_config, _train_loader_from_config
from detectron2.engine import DefaultTrainer, HookBase, defaults, hooks
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..data import PanopticFPNMapper
from ..data.label_space import with_isthing
from ..data.training_batches import TrainingBatches, same_random_state, seed_everything
from ..data.watched_records import WatchedRecords, deaths_are_named, is_death
from ..errors import UserError
from ..evaluation import EvaluationUserError, IndependentEvaluators, build_evaluator
from .checkpoint import PanopticFPNCheckpointer
from .checkpoint_hooks import KeepBest, KeepNewest, StoppedEarly
from .failed_batch import save_failed_batch
from .interruption import Interrupted, StopOnSignal
from .tracking import TrackingWriter, build_tracking_writer
from .validation_loss import validation_losses


# What a user can put right is said once, at the end, without a traceback.
def _is_said_once(error: BaseException | None) -> bool:
    kinds = (UserError, Interrupted, StoppedEarly, FloatingPointError)
    return isinstance(error, kinds) or is_death(error)


logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and _is_said_once(record.exc_info[1]))
)
logger = logging.getLogger(__name__)

OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}
CLIP_TYPES = ("value", "norm", "full_model")


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
        self._evaluation_error: EvaluationUserError | None = None
        self._tracking: TrackingWriter | None = None
        self._seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        # Detectron2's constructor wants a GPU in several processes, and leaves no method to
        # override where it makes the model data parallel.
        alternate = cfg.MODEL.PANOPTIC_FPN.TRAINING == "alternate"
        create = partial(
            defaults.create_ddp_model,
            device_ids=None,  # where the model is
            find_unused_parameters=alternate,  # those of the other task
        )
        with mock.patch.object(defaults, "create_ddp_model", create):
            super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks; what they save and resume is :class:`PanopticFPNCheckpointer`'s.

        An evaluator that fails stops no training.
        """
        self.checkpointer = PanopticFPNCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        built = [
            KeepNewest(self.checkpointer, hook.period, self.cfg.SOLVER.CHECKPOINT_KEEP)
            if isinstance(hook, hooks.PeriodicCheckpointer)
            else hook
            for hook in super().build_hooks()
        ]
        # After the scheduler and the periodic checkpoint, before an evaluation that takes long.
        place = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        test = self.cfg.TEST
        built[place] = hooks.EvalHook(test.EVAL_PERIOD, self._test_and_go_on)
        if test.BEST_METRIC:
            evaluation = KeepBest(
                self.checkpointer, test.BEST_METRIC, test.EVAL_PERIOD, built[place], test.PATIENCE
            )
            built.insert(place + 1, evaluation)
        return [*built[:place], StopOnSignal(), *built[place:]]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, before them that of ``TRACKING.WRITER``, if any.

        Raises:
            UserError: its package is not installed.
        """
        self._tracking = build_tracking_writer(self.cfg)
        return [*([self._tracking] if self._tracking else []), *super().build_writers()]

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a resumed training gets the images that it would have got."""
        super().resume_or_load(resume)
        batches = self._trainer.data_loader
        if isinstance(batches, TrainingBatches):
            batches.seed, batches.start = self._seed, self.start_iter

    def run_step(self) -> None:
        # What is random in an iteration follows from its number: nothing has to be saved of it.
        seed_everything(self._seed, self.iter, comm.get_rank())
        super().run_step()

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 v0.6 forgets the optimizer and the gradient scaler.
        own = {"_trainer": self._trainer.state_dict(), "order": self._order()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("The checkpoint has no state of the optimizer: it starts anew")
        order = state_dict.get("order", {})
        self._seed = order.get("seed", self._seed)
        if order != self._order():
            logger.warning(
                "The training began with %s; now it is %s: the order of the images is a new one",
                order or "an order that is not known",
                self._order(),
            )

    def _order(self) -> dict[str, int]:
        """What the order of the images follows from, beside the dataset."""
        return {
            "seed": self._seed,
            "images": self.cfg.SOLVER.IMS_PER_BATCH,
            "processes": comm.get_world_size(),
        }

    def _test_and_go_on(self) -> dict[str, Any]:
        self._evaluation_error = None
        if comm.get_world_size() > 1:
            # Statistics of batches differ between processes; the checkpoint has the first one's.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        try:
            self._last_eval_results = self.test(self.cfg, self.model)
        except EvaluationUserError as error:
            self._last_eval_results, self._evaluation_error = error.results, error
        return self._last_eval_results

    def train(self) -> dict[str, Any] | None:
        """As Detectron2's.

        Raises:
            UserError: the losses grew beyond all bounds; an image cannot be loaded, or the process
                that was to load it died; the disk is full; ``TRACKING.WRITER`` cannot begin; or,
                when all is done, an evaluator failed in the last evaluation.
            Interrupted: see :class:`StopOnSignal`.
        """
        tracking = self._tracking
        with tracking.run(resume=self.start_iter > 0) if tracking else nullcontext():
            return self._train()

    def _train(self) -> dict[str, Any] | None:
        try:
            with deaths_are_named():
                results = super().train()
        except StoppedEarly as reason:
            logger.info("Training %s", reason)
            results = self._last_eval_results
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, results)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}: {error.strerror}") from error
        except FloatingPointError as error:
            raise UserError(self._failure(error)) from error
        if self._evaluation_error:
            raise self._evaluation_error
        return results

    def _failure(self, error: FloatingPointError) -> str:
        """What to say of an iteration whose loss is infinite or nan; its batch is saved."""
        batch: list[dict[str, Any]] = []
        batches, saved = self._trainer.data_loader, ""
        if isinstance(batches, TrainingBatches):
            batches.start = self.iter
            batch = next(iter(batches))
            seeds = self._seed, self.iter, comm.get_rank()
            try:
                saved = save_failed_batch(
                    self.cfg.OUTPUT_DIR,
                    model=self.model,
                    batch=batch,
                    seeds=seeds,
                    iteration=self.iter,
                )
            except UserError as reason:
                logger.warning("The batch is not kept: %s", reason)
        losses = re.findall(r"'(loss_\w+)': (?:np.float64\()?([\w.+-]+)", str(error))
        terms = ", ".join(f"{name} {float(value):.3g}" for name, value in losses)
        terms = terms or str(error).rstrip(".")
        names = ", ".join(image.get("file_name", "an image") for image in batch)
        replayed = (
            f"; python tools/replay_batch.py {saved} says where it comes from" if saved else ""
        )
        return (
            f"the loss is infinite or nan at iteration {self.iter}: {terms}, of "
            f"{names or 'images that are not known'} (seed {self._seed}); lower SOLVER.BASE_LR "
            f"{self.cfg.SOLVER.BASE_LR}, lengthen SOLVER.WARMUP_ITERS, or set "
            f"SOLVER.CLIP_GRADIENTS.ENABLED True{replayed}"
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of ``MODEL.META_ARCHITECTURE``; ``log.txt`` says what it consists of."""
        model = build_model(cfg)
        logger.debug("Model:\n%s", model)
        number = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%s of %.1f million parameters", type(model).__name__, number / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that ``SOLVER.OPTIMIZER`` names; it clips gradients before its step.

        Beside Detectron2's ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``, ``"value"`` and ``"norm"`` of each
        parameter, there is ``"full_model"``: the norm of all gradients together.

        Raises:
            UserError: no such optimizer or type of clipping.
        """
        optimizer_class = optimizer_named(cfg.SOLVER.OPTIMIZER)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
            raise UserError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip.CLIP_TYPE!r}: allowed are {CLIP_TYPES}"
            )
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        if optimizer_class is torch.optim.SGD:
            extra = {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
        else:
            # In mixed precision a fused step gets scaled gradients: too late to clip them.
            extra = {"fused": not clip.ENABLED}
        optimizer = optimizer_class(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, **extra
        )
        if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
            return maybe_add_gradient_clipping(cfg, optimizer)
        max_norm, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE

        def clip_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainingBatches:
        """The batches of ``DATASETS.TRAIN``, in the order of ``DATALOADER.SAMPLER_TRAIN``."""
        mapper = PanopticFPNMapper(cfg, is_train=True)
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )

        def instances(record: dict[str, Any]) -> list[dict[str, Any]]:
            if "annotations" in record:
                return record["annotations"]
            segments = with_isthing(record.get("segments_info", ()), mapper.thing_sem_seg_ids)
            return [segment for segment in segments if segment["isthing"]]

        # Detectron2 counts annotations, which records of panoptic PNGs alone lack.
        is_counted = cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
        counted = [{"annotations": instances(r)} for r in records] if is_counted else records

        def sampler(seed: int) -> Iterable[int]:
            # Detectron2 draws its samplers' seeds.
            with same_random_state():
                seed_everything(seed)
                return _train_loader_from_config(cfg, mapper, dataset=counted)["sampler"]

        return TrainingBatches(
            records,
            mapper,
            sampler,
            batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            names=cfg.DATASETS.TRAIN,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = PanopticFPNMapper(cfg, is_train=False)
        arguments = _test_loader_from_config(cfg, dataset_name, mapper)
        records = WatchedRecords(
            arguments.pop("dataset"),
            arguments.pop("mapper"),
            names=(dataset_name,),
            num_workers=arguments["num_workers"],
        )
        return build_detection_test_loader(records, mapper=None, **arguments)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> IndependentEvaluators:
        return build_evaluator(cfg, dataset_name, _inference_folder(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate, and write all scores to ``OUTPUT_DIR/inference/metrics.json``.

        Returns:
            The scores, as :meth:`DefaultTrainer.test`.

        Raises:
            UserError: an image cannot be loaded, or the process that was to load it died.
            EvaluationUserError: an evaluator failed, in whatever process. What the others found is
                written, and in the error.
        """
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        with deaths_are_named():
            results = super().test(cfg, model, evaluators)
            losses = {
                name: validation_losses(cfg, model, name)
                for name in (cfg.DATASETS.TEST if cfg.TEST.LOSS else ())
            }
        if comm.is_main_process():
            for name, values in losses.items():
                scores = results if len(cfg.DATASETS.TEST) == 1 else results[name]
                scores["validation"] = values
        if results and comm.is_main_process():
            folder = os.path.join(cfg.OUTPUT_DIR, "inference")
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, "metrics.json")
            scores = flatten_results_dict(results)
            with open(path, "w") as file:  # nan is not JSON
                json.dump({k: None if v != v else v for k, v in scores.items()}, file, indent=2)
            logger.info("Scores written to %s", path)
        failures = [
            failure
            for evaluator in (evaluators if isinstance(evaluators, list) else [evaluators])
            for failure in getattr(evaluator, "failures", ())
        ]
        if failures:
            raise EvaluationUserError(f"evaluation is not complete: {'; '.join(failures)}", results)
        return results


def _inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where evaluators write: a folder of its own for each of several datasets."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return folder if len(cfg.DATASETS.TEST) == 1 else os.path.join(folder, dataset_name)
