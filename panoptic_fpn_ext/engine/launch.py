"""The processes of a run, on GPUs or CPUs: torch's own engine starts and watches them."""

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    get_error_handler,
    record,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import UserError
from .interruption import SIGNALS, Interrupted

logger = logging.getLogger(__name__)

PROCESS_OPTIONS = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
"""Options of Detectron2's command line that say what processes there are, with their defaults."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` has started."""
    return dist.is_torchelastic_launched()


def choose_processes(args: argparse.Namespace) -> None:
    """Complete :data:`PROCESS_OPTIONS` in the arguments, by what ``torchrun`` says or the defaults.

    Args:
        args: those of Detectron2's ``default_argument_parser``; None stands for what was not given.

    Raises:
        UserError: one was given, and ``torchrun`` says it too.
    """
    given = [name for name in PROCESS_OPTIONS if getattr(args, name, None) is not None]
    values = dict(PROCESS_OPTIONS)
    if started_by_torchrun():
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{option}: torchrun has started the processes already; leave it out")
        world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        values |= {"num_gpus": here, "num_machines": world // here}
        values["machine_rank"] = int(os.environ["GROUP_RANK"])
        if os.environ["LOCAL_RANK"] != "0":  # the first says what they all would
            logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)
    for name in PROCESS_OPTIONS.keys() - given:
        setattr(args, name, values[name])


def launch(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
    device: str = "cuda",
) -> None:
    """Run ``main(*args)`` in ``num_processes`` processes on this machine.

    With GPUs each process gets one and NCCL connects them; without, or on CPUs, gloo does. Under
    ``torchrun`` this process is one of them already. When one ends before its time, so do the
    others, after 30 seconds at the latest; signals are passed on to all.

    Args:
        main: what to run; must be importable.
        num_processes: processes on this machine (``--num-gpus``).
        num_machines: machines in all; the command is called on each.
        machine_rank: which of them this is.
        dist_url: where the processes meet, ``tcp://host:port``; ``"auto"`` on one machine.
        args: arguments of ``main``.
        device: what the processes compute on (``MODEL.DEVICE``).

    Raises:
        UserError: one that ``main`` raised, in whatever process; several machines without a
            ``dist_url``; or fewer GPUs than processes.
        Interrupted: ``main`` was, or this process before it could pass a signal on.
        ChildFailedError: a process ended otherwise; says which, and why.
    """
    if num_machines > 1 and dist_url == "auto" and not started_by_torchrun():
        raise UserError("--dist-url is needed with several machines: tcp://HOST:PORT of the first")
    on_gpus = torch.cuda.is_available() and device.startswith("cuda")
    if on_gpus and num_processes > torch.cuda.device_count():
        option = "--nproc-per-node" if started_by_torchrun() else "--num-gpus"
        raise UserError(
            f"{option} {num_processes}, but this machine has {torch.cuda.device_count()} GPUs: "
            "lower it, or set MODEL.DEVICE to cpu"
        )
    if started_by_torchrun():
        record(process_of_run)(main, args, on_gpus)
    elif num_processes * num_machines == 1:
        main(*args)
    else:
        _spawn(main, num_processes, num_machines, machine_rank, dist_url, args, on_gpus)


def says(message: str) -> bool:
    """Whether this process is the one of those of ``torchrun`` to say what they all may have to."""
    try:
        store = _store_of_torchrun(timedelta(seconds=10))
        return store is None or store.add(f"said/{message}", 1) == 1
    except RuntimeError:  # torchrun is gone
        return True


def _store_of_torchrun(timeout: timedelta) -> dist.Store | None:
    """What the processes of this attempt share; None where ``torchrun`` keeps no store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(f"panoptic_fpn_ext/{attempt}", store)


def _spawn(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
    on_gpus: bool,
) -> None:
    with tempfile.TemporaryDirectory() as logs, _usr1_is_passed_on(), _silence():
        config = LaunchConfig(
            min_nodes=num_machines,
            max_nodes=num_machines,
            nproc_per_node=num_processes,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **_meeting(dist_url, machine_rank),
        )
        try:
            elastic_launch(config, process_of_run)(main, args, on_gpus)
        except SignalException as caught:  # the processes have said what they made of it
            raise _interrupted(caught.sigval) from None
        except ChildFailedError as error:
            failures = error.failures.values()
            if lines := [line for failure in failures if (line := _user_error(failure))]:
                raise UserError(lines[0]) from None
            statuses = {failure.exitcode for failure in failures}
            if interrupted := statuses & {128 + number for number in SIGNALS}:
                raise _interrupted(max(interrupted) - 128) from None
            raise


def _interrupted(signum: int) -> Interrupted:
    return Interrupted(f"stopped by {signal.Signals(signum).name}", 128 + signum)


def _meeting(dist_url: str, machine_rank: int) -> dict[str, Any]:
    """Where the processes find each other, in the words of torch's engine."""
    if dist_url == "auto":  # a port that no other run may have
        return {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "run_id": uuid.uuid4().hex,
            "local_addr": "127.0.0.1",
        }
    try:
        url = urlsplit(dist_url)
        port = url.port
    except ValueError:
        port = None
    if port is None or url.scheme != "tcp" or not url.hostname:
        raise UserError(f"--dist-url {dist_url}: expected tcp://HOST:PORT")
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{url.hostname}:{port}",
        "rdzv_configs": {"rank": machine_rank},
        "run_id": "panoptic_fpn_ext",
    }


@contextmanager
def _usr1_is_passed_on() -> Iterator[None]:
    """SIGUSR1 does to torch's engine what SIGTERM does: it passes it on, and waits."""

    def receive(signum: int, frame: FrameType | None) -> None:
        raise SignalException(f"signal {signum}", signal.Signals(signum))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def _silence() -> Iterator[None]:
    """Of torch's engine, in this process: what ended the others is in its error."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _user_error(failure: ProcessFailure) -> str:
    """The line of the UserError that a process has ended with; empty if it was none."""
    message = failure.message
    kind, _, line = (message.get("message", "") if isinstance(message, dict) else "").partition(
        ": "
    )
    return line if kind.endswith("UserError") and failure.exitcode == 2 else ""


def process_of_run(main: Callable[..., Any], args: tuple, on_gpus: bool) -> None:
    """Call ``main`` in a process that torch's engine has started."""
    try:
        _join(on_gpus)
        main(*args)
    except Interrupted as interruption:
        if not _spawned():
            raise
        if comm.is_main_process():
            logger.warning("%s", interruption)
        comm.synchronize()  # the first that ends takes the others with it
        sys.exit(interruption.status)
    except UserError as error:
        if not _spawned():
            raise
        get_error_handler().record_exception(error)
        sys.exit(2)
    dist.destroy_process_group()


def _spawned() -> bool:
    """Whether the process is one of :func:`_spawn`'s, which hears of errors."""
    return torch.multiprocessing.parent_process() is not None


def _join(on_gpus: bool) -> None:
    """Connect this process with the others, all and those of its machine."""
    for message in ("TypedStorage is deprecated", "`broadcast_buffers` is deprecated"):
        warnings.filterwarnings("ignore", message)  # Detectron2 v0.6
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # the processes share the cores
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend, store = "nccl" if on_gpus else "gloo", None
    # When torchrun begins anew, its store still has the addresses of the processes before (PyTorch
    # 2.14). Machines may count their attempts differently; one knows which it is.
    if world_size == int(os.environ["LOCAL_WORLD_SIZE"]):
        store = _store_of_torchrun(DEFAULT_TIMEOUT)
    place = {"store": store, "rank": rank, "world_size": world_size} if store else {}
    dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT, **place)
    machines: list[int] = [0] * world_size
    dist.all_gather_object(machines, int(os.environ["GROUP_RANK"]))
    for machine in sorted(set(machines)):
        group = dist.new_group([rank for rank, place in enumerate(machines) if place == machine])
        if machine == int(os.environ["GROUP_RANK"]):
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()  # a first collective that waits for all
