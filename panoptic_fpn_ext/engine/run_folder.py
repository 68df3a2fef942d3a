"""``OUTPUT_DIR``: logs and configs in it, and that it belongs to one training."""

import argparse
import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..errors import UserError
from .failed_batch import FILE as FAILED_BATCH
from .tracking import RUN_FILE

LOGGERS = ("fvcore", "detectron2", "panoptic_fpn_ext")
CHECKPOINTS = ("last_checkpoint", "model_*.pth")
METRICS = ("metrics.json", "events.out.tfevents.*", FAILED_BATCH, RUN_FILE)

logger = logging.getLogger(__name__)


def prepare_process(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What Detectron2's ``default_setup`` does in each process, but for writing the config.

    The terminal gets what is worth reading there; environment, config and model, which are hundreds
    of lines, go to ``log.txt`` alone.

    Args:
        cfg: the config of the run.
        args: those of Detectron2's ``default_argument_parser``.
    """
    rank = comm.get_rank()
    for name in LOGGERS:
        for handler in setup_logger(cfg.OUTPUT_DIR, rank, name=name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.INFO)
    logger.info("Process %d of %d: %s", rank, comm.get_world_size(), args)
    logging.disable(logging.WARNING)  # that there is no CUDA, no compiler
    environment = collect_env_info()
    logging.disable(logging.NOTSET)
    logger.debug("Environment:\n%s", environment)
    logger.debug("Config:\n%s", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not cfg.DETERMINISTIC
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def write_config(cfg: CfgNode, folder: str | os.PathLike) -> None:
    """Write ``config.yaml`` into a folder, in the main process; whole or not at all."""
    if comm.is_main_process():
        path = Path(folder, "config.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(cfg.dump())
        partial.replace(path)


def check_writable(folder: str | os.PathLike) -> None:
    """Make a folder, if it is not there.

    Raises:
        UserError: it is a file, or nothing can be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder}: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"OUTPUT_DIR {folder}: may not be written to; choose another")


@contextmanager
def owned(folder: str | os.PathLike, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """While in it, no other process trains in a folder.

    Args:
        folder: ``OUTPUT_DIR``, which exists.
        resume: whether the training in it goes on.
        overwrite: whether it may be replaced.

    Raises:
        UserError: another process trains in it; or a training is there that neither goes on nor may
            be replaced.
    """
    with Path(folder, ".lock").open("w") as lock:
        try:
            # Of the process alone: those that load images for it may outlive it by seconds.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"OUTPUT_DIR {folder}: another training is running there; choose another"
            ) from error
        except OSError as error:  # a network's file system may have no locks
            logger.warning("%s cannot be locked (%s): start no other there", folder, error.strerror)
        if not (resume or overwrite) and checkpoints_in(folder):
            raise UserError(
                f"OUTPUT_DIR {folder} has a training: go on with it by --resume, replace it by "
                "--overwrite, or choose another"
            )
        yield


def note_torchrun(folder: str | os.PathLike) -> None:
    """In the main process: from now on the training in the folder is that of this ``torchrun``."""
    if comm.is_main_process():
        Path(folder, ".torchrun").write_text(_torchrun())


def is_restarted(folder: str | os.PathLike) -> bool:
    """Whether ``torchrun`` has started this process anew, for a training that has begun."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return False
    try:
        return Path(folder, ".torchrun").read_text() == _torchrun()
    except OSError:
        return False


def _torchrun() -> str:
    """What the processes of one ``torchrun`` share; empty without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name} {os.getppid()}" if name == "none" else name  # its default, on one machine


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a training, and the file that names the last."""
    return _found(folder, CHECKPOINTS)


def files_of_training(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints and metrics of an earlier training."""
    return _found(folder, (*CHECKPOINTS, *METRICS))


def remove(files: list[Path]) -> None:
    """Remove the files of an earlier training, in the main process.

    A file of metrics that is open already is emptied.
    """
    for path in files if comm.is_main_process() else ():
        if path.name == "metrics.json":
            os.truncate(path, 0)
        else:
            path.unlink(missing_ok=True)


def _found(folder: str | os.PathLike, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
