"""Several processes: they train one model, meet in any way that torch has, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from panoptic_fpn_ext import add_panoptic_fpn_config
from panoptic_fpn_ext.config import resolve_config
from panoptic_fpn_ext.engine import Trainer, launch, run_folder

from ..conftest import CONFIG, REPOSITORY, SMALL, train_net

pytestmark = pytest.mark.distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAININGS = {
    "joint": [],
    "alternating": ["MODEL.PANOPTIC_FPN.TRAINING", "alternate"],
    "two networks": ["MODEL.META_ARCHITECTURE", "TwoNetworkPanopticFPN"],
}
# The losses are means over what a process has of each kind: here the images have equally much.
EQUAL = [
    *("MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.BASE_LR", 0.0001),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1023, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 200, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 10, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.99]),
]


def losses_of_trainings(folder: Path) -> None:
    """Write the losses of a few iterations of each kind of training."""
    name = "shapes_equal"
    records = [
        record
        for record in DatasetCatalog.get("shapes_train")
        if len(record["annotations"]) == 2
        and sum(segment["area"] for segment in record["segments_info"]) == 64 * 64
    ]
    assert len(records) == 4
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: records)
        known = MetadataCatalog.get("shapes_train").as_dict()
        MetadataCatalog.get(name).set(**{**known, "name": name})
    found = {}
    for kind, options in TRAININGS.items():
        data = "DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "SEED", 3
        cfg = config(folder / f"{kind} {comm.get_world_size()}", *EQUAL, *data, *options)
        torch.manual_seed(comm.get_rank())  # whatever others begin with, the model is the first's
        trainer = Trainer(cfg)
        trainer.train()
        histories = trainer.storage.histories()
        found[kind] = {
            key: [value for value, _ in history.values()]
            for key, history in histories.items()
            if "loss" in key
        }
    if comm.is_main_process():
        (folder / f"{comm.get_world_size()}.json").write_text(json.dumps(found))


def config(output: Path, *options) -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / CONFIG))
    cfg.merge_from_list([*SMALL, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 4, *options])
    cfg.OUTPUT_DIR = str(output)
    output.mkdir(parents=True, exist_ok=True)
    return resolve_config(cfg)


def test_two_processes_have_the_losses_of_one(shapes, tmp_path):
    for processes in (1, 2):
        launch(losses_of_trainings, processes, args=(tmp_path,), device="cpu")
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    for kind in TRAININGS:
        assert one[kind].keys() == two[kind].keys()
        for name, values in one[kind].items():
            assert two[kind][name] == pytest.approx(values, rel=1e-3, abs=1e-5), (kind, name)
        totals = one[kind]["total_loss"]
        assert len(totals) == 4
        assert len(set(totals)) == 4


def evaluate_statistics(folder: Path) -> None:
    """After a step in which each process saw other images, all evaluate the same model."""
    trainer = Trainer(config(folder, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0))
    seen = []
    trainer.test = lambda cfg, model: seen.append([b.clone() for b in model.buffers()]) or {}
    trainer.train()
    for buffer in seen[0]:
        first = buffer.clone()
        dist.broadcast(first, 0)
        assert torch.equal(buffer, first)


def stop_early(folder: Path) -> None:
    """Only the first process has scores; all stop in the same iteration."""
    keys = "TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "panoptic_seg/PQ", "TEST.PATIENCE", 2
    trainer = Trainer(config(folder, "SOLVER.MAX_ITER", 9, *keys))
    found = {"panoptic_seg": {"PQ": 50.0}} if comm.is_main_process() else {}
    trainer.test = lambda cfg, model: found
    trainer.train()
    assert comm.all_gather(trainer.iter) == [2, 2]


def evaluate_and_stop(folder: Path) -> None:
    evaluate_statistics(folder / "evaluated")
    stop_early(folder / "stopped")


def test_all_processes_evaluate_the_model_that_is_saved_and_stop_together(shapes, tmp_path):
    launch(evaluate_and_stop, 2, args=(tmp_path,), device="cpu")
    assert (tmp_path / "stopped/last_checkpoint").read_text() == "model_final.pth"
    assert (tmp_path / "stopped/model_best.pth").exists()


@pytest.mark.parametrize("processes", [4])
def test_scores_do_not_depend_on_the_number_of_processes(trained, tmp_path, processes):
    """Of 6 images two have two each, and two have one."""
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--num-gpus", processes, *SMALL),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path) == scores(trained)


def scores(output: Path) -> str:
    return (output / "inference" / "metrics.json").read_text()


LIFE = [
    *("SEED", 1, "DETERMINISTIC", True, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.MAX_ITER", 8),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 1),
]


@contextmanager
def started(launcher: list, output: Path, *options) -> Iterator[subprocess.Popen]:
    """A training, which has ended in the end; what it says goes to ``output.txt``."""
    words = [*launcher, "train_net.py", "--config-file", CONFIG, *options]
    if "OUTPUT_DIR" not in options:
        words += ["OUTPUT_DIR", output]
    with output.with_suffix(".txt").open("w") as said:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_OUTPUT": str(output)},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
        process.wait(timeout=120)
    finally:
        for pid in processes_of(output):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def processes_of(output: Path, *variables: str) -> list[int]:
    """All that run for a training that :func:`started`, and have these environment variables."""
    wanted = {f"TEST_OUTPUT={output}", *variables}
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            has = wanted <= set(file.read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue
        if has:
            found.append(int(file.parent.name))
    return found


def wait_until(happened, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def in_two_processes(shapes, tmp_path_factory) -> Path:
    """The output folder of a training in two processes."""
    output = tmp_path_factory.mktemp("two") / "output"
    run = train_net("--config-file", CONFIG, "--num-gpus", 2, *SMALL, *LIFE, "OUTPUT_DIR", output)
    assert run.returncode == 0, run.stderr[-3000:]
    return output


def assert_same_training(found: Path, expected: Path) -> None:
    assert scores(found) == scores(expected)
    models = [torch.load(o / "model_final.pth", weights_only=True) for o in (found, expected)]
    assert models[0]["iteration"] == models[1]["iteration"] == 7
    for name, value in models[1]["model"].items():
        assert torch.equal(models[0]["model"][name], value), name


def test_torchrun_begins_anew_where_a_process_died(in_two_processes, tmp_path):
    """And ends with the model of ``--num-gpus 2``, which nothing happened to."""
    output = tmp_path / "output"
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    with started(launcher, output, *SMALL, *LIFE) as process:
        wait_until(lambda: (output / "last_checkpoint").exists())
        os.kill(min(processes_of(output, "RANK=1")), signal.SIGKILL)
    said = output.with_suffix(".txt").read_text()
    assert process.returncode == 0, said[-3000:]
    starts = re.findall(r"Starting training from iteration (\d)", said)
    assert starts in (["0", "3"], ["0", "6"])
    assert_same_training(output, in_two_processes)


@pytest.mark.parametrize("launcher", ["torchrun", "train_net.py"])
def test_two_machines_train_one_model(in_two_processes, tmp_path, launcher):
    output, port = tmp_path / "output", free_port()
    options = [[], []]
    if launcher == "torchrun":
        address = "--master-addr", "127.0.0.1", "--master-port", port
        commands = [[*TORCHRUN, "--nnodes", 2, "--node-rank", k, *address] for k in (0, 1)]
    else:
        commands = [[sys.executable]] * 2
        url = "--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{port}"
        options = [[*url, "--machine-rank", k] for k in (0, 1)]
    said = [tmp_path / "first", tmp_path / "second"]
    first, second = (
        started(commands[k], said[k], *options[k], *SMALL, *LIFE, "OUTPUT_DIR", output)
        for k in (0, 1)
    )
    with first as one, second as two:
        pass
    assert (one.returncode, two.returncode) == (0, 0)
    assert_same_training(output, in_two_processes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_ctrl_c_comes_twice_and_stops_once(shapes, tmp_path):
    """From the terminal, and from the process that watches the others."""
    output = tmp_path / "output"
    options = "--num-gpus", 2, *SMALL, *LIFE, "SOLVER.MAX_ITER", 10000, "DATASETS.TEST", ()
    with started([sys.executable], output, *options) as process:
        wait_until(lambda: (output / "last_checkpoint").exists())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=120)
        wait_until(lambda: not processes_of(output), timeout=20)
    said = output.with_suffix(".txt").read_text()
    assert process.returncode == 128 + signal.SIGINT, said[-3000:]
    (last,) = re.findall(r"stopped by SIGINT after iteration (\d+), saved; --resume", said)
    assert (output / "last_checkpoint").read_text() == f"model_{int(last):07d}.pth"
    assert "Traceback" not in said


def test_torchrun_knows_how_many_processes_there_are(shapes, tmp_path):
    output = tmp_path / "output"
    with started([*TORCHRUN, "--nproc-per-node", 2], output, "--num-gpus", 2, *SMALL) as process:
        pass
    assert process.returncode == 1
    said = output.with_suffix(".txt").read_text()
    line = "error: --num-gpus: torchrun has started the processes already; leave it out"
    assert said.count(line) == 1
    assert not output.exists()


def wait_for_one_that_fails(how: str) -> None:
    if comm.get_rank() == 1:
        if how == "raises":
            raise KeyError("what rank 1 lacks")
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "message"), [("raises", "KeyError: 'what rank 1 lacks'"), ("dies", "SIGKILL")]
)
def test_a_process_that_fails_is_named_and_ends_the_others(how, message):
    with pytest.raises(ChildFailedError) as caught:
        launch(wait_for_one_that_fails, 2, args=(how,), device="cpu")
    rank, failure = min(caught.value.failures.items(), key=lambda item: item[1].exitcode)
    assert message in str(caught.value)
    assert "rank      : 1" in str(caught.value)
    if how == "raises":
        assert "in wait_for_one_that_fails" in str(caught.value)  # the traceback
    else:
        assert (rank, failure.exitcode) == (1, -signal.SIGKILL)


@pytest.mark.parametrize(
    ("count", "run", "restarted"), [("0", "a", False), ("1", "a", True), ("1", "b", False)]
)
def test_a_training_of_another_torchrun_is_not_gone_on_with(
    tmp_path, monkeypatch, count, run, restarted
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run_folder.note_torchrun(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert run_folder.is_restarted(tmp_path) == restarted
    assert not run_folder.is_restarted(tmp_path / "nothing")
