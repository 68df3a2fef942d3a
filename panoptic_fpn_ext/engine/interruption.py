"""Stopping a training between two iterations, with a checkpoint to go on from."""

import logging
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, and what schedulers send
ECHO = 3.0
"""Seconds. What a terminal sends to all processes, the one that watches them passes on too."""

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """A training was told to stop, and did so; ``status`` is the exit status of that."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


class StopOnSignal(HookBase):
    """Finishes the iteration when a signal comes, saves a checkpoint, and stops all processes.

    The second signal of a kind, after :data:`ECHO`, does what it does elsewhere.

    Raises:
        Interrupted: after the iteration in which a process got a signal.
    """

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._handlers = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._receive) for s in SIGNALS}

    def after_train(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def after_step(self) -> None:
        received = self._received_anywhere()
        iteration = self.trainer.iter
        if not received or iteration + 1 >= self.trainer.max_iter:
            return
        self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        raise Interrupted(
            f"stopped by {signal.Signals(received).name} after iteration {iteration}, saved; "
            "--resume goes on",
            status=128 + received,
        )

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received != signum:
            self._received, self._received_at = signum, time.monotonic()
            message = f"{signal.Signals(signum).name}: stopping after this iteration"
            # In another thread: this one may be within a call that writes a line of the log.
            threading.Thread(target=logger.warning, args=(message,)).start()
        elif time.monotonic() - self._received_at > ECHO:
            signal.signal(signum, self._handlers.pop(signum))
            signal.raise_signal(signum)

    def _received_anywhere(self) -> int:
        if comm.get_world_size() == 1:
            return self._received
        received = torch.tensor(self._received)
        dist.all_reduce(received, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return int(received)
