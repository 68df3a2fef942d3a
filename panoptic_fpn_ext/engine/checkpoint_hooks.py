"""Which checkpoints a training keeps: the newest, the best; and when there is no better to come."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..errors import UserError
from .checkpoint import BEST, PanopticFPNCheckpointer
from .checkpoint_files import read_checkpoint

logger = logging.getLogger(__name__)


class KeepNewest(hooks.PeriodicCheckpointer):
    """Detectron2's hook, of whose checkpoints the newest are kept.

    Its own ``max_to_keep`` knows those of one process alone: a resumed training would leave what it
    found, and one that it fell back to could be removed for a damaged one.
    """

    def __init__(self, checkpointer: PanopticFPNCheckpointer, period: int, keep: int) -> None:
        """
        Args:
            checkpointer: saves and removes.
            period: iterations between two.
            keep: how many, 0 for all.
        """
        super().__init__(checkpointer, period)
        self._keep = keep

    def after_step(self) -> None:
        super().after_step()
        if self._keep and (self.trainer.iter + 1) % self.period == 0:
            self.checkpointer.keep_newest(self._keep, self.trainer.iter)


class StoppedEarly(Exception):
    """A training that did not get better is over; its last checkpoint is ``model_final.pth``."""


class KeepBest(HookBase):
    """Keeps the checkpoint of the best score, and ends a training that gets no better.

    All that it knows is in that checkpoint: the score, with the weights that have it, is on the
    disk at once or not at all. How many evaluations there were since follows from the iterations. A
    checkpoint from before the evaluation of its iteration lacks that: a training resumed from it
    evaluates first.

    Detectron2's ``BestCheckpointer`` does not serve: it knows no score after resuming, makes
    ``last_checkpoint`` name the best, takes the score before for that of an evaluator that failed,
    and saves that of the last evaluation as one iteration too far.

    Raises:
        StoppedEarly: after an evaluation, the last of so many without a better score.
    """

    def __init__(
        self,
        checkpointer: PanopticFPNCheckpointer,
        metric: str,
        period: int,
        evaluation: hooks.EvalHook,
        patience: int = 0,
    ) -> None:
        """
        Args:
            checkpointer: saves the best and the final checkpoint.
            metric: the name of the score; smaller is better for those of ``validation/``.
            period: iterations between two evaluations.
            evaluation: what evaluates, and keeps the results as the trainer's
                ``_last_eval_results``; the hook before this one.
            patience: how many evaluations without a better score end the training; 0 for none.
        """
        self._checkpointer, self._evaluation = checkpointer, evaluation
        self._metric, self._period, self._patience = metric, period, patience
        self._sign = -1 if "validation/" in metric else 1
        self._score: float | None = None
        self._iteration = -1  # of the best score; without one, of the last that is not counted

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if not start:
            return
        self._iteration = start - 1
        if comm.is_main_process():
            self._read()
        known = self._score is not None and self._iteration == start - 1
        if start % self._period == 0 and start < self.trainer.max_iter and not _anywhere(known):
            with self._at(start - 1):
                self._evaluation._do_eval()
                self._judge()

    def after_step(self) -> None:
        following = self.trainer.iter + 1
        if following % self._period == 0 and following != self.trainer.max_iter:
            self._judge()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:  # as EvalHook
            with self._at(self.trainer.max_iter - 1):
                self._judge(last=True)

    def _read(self) -> None:
        """The score and the iteration of the best checkpoint, where there is one."""
        path = os.path.join(self._checkpointer.save_dir, f"{BEST}.pth")
        if not os.path.exists(path):
            return
        try:
            content = read_checkpoint(path)
            metric, score = content["best"]["metric"], float(content["best"]["score"])
            iteration = int(content["iteration"])
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = error if isinstance(error, UserError) else f"{path}: does not say its score"
            logger.warning("%s; the best is sought anew", reason)
            return
        if metric != self._metric:
            logger.warning("%s: the best of %s; the best is sought anew", path, metric)
            return
        self._score, self._iteration = score, iteration

    def _judge(self, *, last: bool = False) -> None:
        """Look at the scores of the evaluation just made, after the trainer's iteration."""
        iteration = self.trainer.iter
        if comm.is_main_process():
            scores = flatten_results_dict(getattr(self.trainer, "_last_eval_results", None) or {})
            self._compare(scores.get(self._metric), iteration)
        evaluations = (iteration + 1) // self._period - (self._iteration + 1) // self._period
        is_over = comm.is_main_process() and 0 < self._patience <= evaluations
        if last or not _anywhere(is_over):
            return
        self._checkpointer.save("model_final", iteration=iteration)
        raise StoppedEarly(
            f"stopped after iteration {iteration}: no better {self._metric} in {self._patience} "
            "evaluations (TEST.PATIENCE)"
        )

    def _compare(self, score: float | None, iteration: int) -> None:
        if score is None or not math.isfinite(score):
            found = "was not found" if score is None else f"is {score}"
            logger.warning("%s %s: no better one", self._metric, found)
        elif self._score is None or self._sign * (score - self._score) > 0:
            self._score, self._iteration = float(score), iteration
            best = {"metric": self._metric, "score": self._score}
            self._checkpointer.save(BEST, iteration=iteration, best=best)
            logger.info("%s %.4f is the best so far", self._metric, score)
        else:
            logger.info(
                "%s %.4f is no better than %.4f after iteration %d",
                *(self._metric, score, self._score, self._iteration),
            )

    @contextmanager
    def _at(self, iteration: int) -> Iterator[None]:
        """While in it, an iteration is the trainer's, as in the hooks after it."""
        trainer, storage = self.trainer, self.trainer.storage
        before = trainer.iter, storage.iter
        trainer.iter = storage.iter = iteration
        try:
            yield
        finally:
            trainer.iter, storage.iter = before


def _anywhere(condition: bool) -> bool:
    """Whether it holds in a process; the same in all."""
    return any(comm.all_gather(condition))
