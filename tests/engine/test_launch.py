"""Starting processes."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import launch


def test_several_machines_need_an_address():
    with pytest.raises(UserError, match="--dist-url is needed with several machines"):
        launch(print, 1, num_machines=2)


def test_one_process_runs_here():
    called = []
    launch(called.append, 1, args=("argument",))
    assert called == ["argument"]


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--num-gpus 3, but this machine has 2 GPUs: lower it"):
        launch(print, 3)


def report(folder: Path) -> None:
    """Write where this process is; rank 3 then fails."""
    ranks_here = torch.tensor([comm.get_rank()])
    dist.all_reduce(ranks_here, group=comm._LOCAL_PROCESS_GROUP)
    found = {
        "size": comm.get_world_size(),
        "ranks": comm.all_gather(comm.get_rank()),
        "local rank": comm.get_local_rank(),
        "local size": comm.get_local_size(),
        "sum of local ranks": ranks_here.item(),
        "threads": torch.get_num_threads(),
    }
    (folder / f"{comm.get_rank()}.json").write_text(json.dumps(found))
    comm.synchronize()
    if comm.get_rank() == 3:
        raise UserError("of rank 3")
    comm.synchronize()


@pytest.mark.distributed
def test_two_machines_of_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor() as pool:  # each machine's command waits for its processes
        first, second = (
            pool.submit(launch, report, 2, 2, machine, url, (tmp_path,), device="cpu")
            for machine in range(2)
        )
        with pytest.raises(ChildFailedError):  # it waits for rank 3
            first.result()
        with pytest.raises(UserError, match="^of rank 3$"):
            second.result()
    for rank in range(4):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "size": 4,
            "ranks": [0, 1, 2, 3],
            "local rank": rank % 2,
            "local size": 2,
            "sum of local ranks": 1 if rank < 2 else 5,
            "threads": 1,
        }
