"""Starting the processes of a run: Detectron2's ``launch``, on machines without a GPU too."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

from ..errors import UserError


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

    With GPUs each process gets one and NCCL connects them; without, or on CPUs, gloo does.

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
    """
    if dist_url == "auto" and num_machines > 1:
        raise UserError("--dist-url is needed with several machines: tcp://HOST:PORT of the first")
    on_gpus = torch.cuda.is_available() and device.startswith("cuda")
    if on_gpus and num_processes > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {num_processes}, but this machine has {torch.cuda.device_count()}: lower "
            "it, or set MODEL.DEVICE to cpu"
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            if dist_url == "auto":
                dist_url = f"file://{folder}/rendezvous"  # no port that another run may have
            worker_args = (main, num_processes, num_machines, machine_rank, dist_url, args)
            if on_gpus or num_processes * num_machines <= 1:
                detectron2_launch(*worker_args)
            else:
                mp.spawn(_cpu_worker, worker_args, nprocs=num_processes)
    except mp.ProcessRaisedException as error:
        traceback = str(error).strip()
        if "UserError: " in traceback.splitlines()[-1]:
            raise UserError(traceback) from error
        raise


def _cpu_worker(
    local_rank: int,
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
) -> None:
    # The processes share the cores.
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=num_machines * num_processes,
        rank=machine_rank * num_processes + local_rank,
    )
    for machine in range(num_machines):
        ranks = range(machine * num_processes, (machine + 1) * num_processes)
        group = dist.new_group(list(ranks))
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()
    main(*args)
    dist.destroy_process_group()
