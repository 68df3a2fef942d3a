"""Checkpoints are there whole or not at all; a training goes on from the newest whole one."""

import errno
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer
from panoptic_fpn_ext.engine.checkpoint_files import whole_file

from ..conftest import CONFIG, CPU, REPOSITORY, SMALL, train_net

pytestmark = pytest.mark.faults


@pytest.fixture
def device() -> torch.device:
    """Files are the same everywhere."""
    return CPU


class Counter:
    """A training state: the number of a checkpoint."""

    def __init__(self, number: int = -1) -> None:
        self.number = number

    def state_dict(self) -> dict:
        return {"number": self.number}

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"]


def checkpointer(folder: Path, number: int = -1, size: int = 4) -> PanopticFPNCheckpointer:
    return PanopticFPNCheckpointer(nn.Linear(size, 1), str(folder), trainer=Counter(number))


def save(folder: Path, *numbers: int, name: str = "") -> None:
    for number in numbers:
        name_of_it = name or f"model_{number:07d}"
        checkpointer(folder, number).save(name_of_it, iteration=number)


def resumed(folder: Path) -> int:
    """The number of the checkpoint that a training goes on from."""
    found = checkpointer(folder)
    found.resume_or_load("", resume=True)
    return found.checkpointables["trainer"].number


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Saving


def test_a_checkpoint_is_named_when_it_is_whole(tmp_path, monkeypatch):
    """The file, then the folder reach the disk before the next is begun."""
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: calls.append(Path(a[1]).name) or replace(*a))
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    save(tmp_path, 3)
    file = ["fsync", "model_0000003.pth", "fsync"]
    assert calls == [*file, "fsync", "last_checkpoint", "fsync"]
    assert sorted(contents(tmp_path)) == ["last_checkpoint", "model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    saved = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert saved.keys() == {"model", "trainer", "iteration"}


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_what_cannot_be_written_leaves_all_as_it_was(tmp_path, monkeypatch, failing, number):
    save(tmp_path, 1, 2)
    before = contents(tmp_path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    if failing == "write":
        monkeypatch.setattr("panoptic_fpn_ext.engine.checkpoint_files._Writer.write", fail)
        monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"content"))
    else:
        monkeypatch.setattr(os, failing, fail)
    for name in ("model_0000002", "model_0000003"):
        with pytest.raises(UserError, match=rf"{name}\.pth: cannot be written") as error:
            checkpointer(tmp_path, 3).save(name, iteration=3)
        assert os.strerror(number) in str(error.value) and "\n" not in str(error.value)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("limit", [0, 1, 100, 4096, 100_000])
def test_a_disk_that_is_full_at_any_byte(tmp_path, limit):
    """As far as a process sees: its files may have so many bytes."""
    save(tmp_path, 1)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = checkpointer(tmp_path, 2, size=200_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(UserError, match=r"model_0000002\.pth: cannot be written \(File too"):
            big.save("model_0000002", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
    assert resumed(tmp_path) == 1


def _save_until_killed(folder: Path) -> None:
    for number in range(2, 10**6):
        checkpointer(folder, number, size=10**6).save("model_final", iteration=number)


def test_a_killed_process_leaves_whole_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    for delay in (0.05, 0.11, 0.17):
        process = context.Process(target=_save_until_killed, args=(tmp_path,))
        process.start()
        while not (tmp_path / "last_checkpoint").exists():
            assert process.is_alive()
        process.join(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        torch.load(tmp_path / "model_final.pth", weights_only=True)
        assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_leftovers_of_a_killed_process_go_with_the_next_save(tmp_path):
    (tmp_path / "model_0000001.pth.partial").write_bytes(b"half a")
    (tmp_path / "last_checkpoint.partial").write_bytes(b"mod")
    (tmp_path / "notes.partial").write_bytes(b"a user's")
    save(tmp_path, 2)
    assert contents(tmp_path).keys() == {"model_0000002.pth", "last_checkpoint", "notes.partial"}


def test_other_errors_leave_no_file_either(tmp_path):
    with pytest.raises(KeyError), whole_file(str(tmp_path / "a")) as file:
        file.write(b"half a")
        raise KeyError
    assert contents(tmp_path) == {}


def test_a_process_that_saves_nothing_writes_nothing(tmp_path):
    model = nn.Linear(4, 1)
    PanopticFPNCheckpointer(model, str(tmp_path), save_to_disk=False).save("model_final")
    PanopticFPNCheckpointer(model).save("model_final")
    assert contents(tmp_path) == {}


# Going on

DAMAGES = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "zeros at the end": lambda content: content[:-300] + bytes(300),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    save(tmp_path, 19, 9, 99)  # the order of writing does not matter
    path = tmp_path / "model_0000099.pth"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 19
    first, second = caplog.messages
    assert first.startswith(f"{path}: not a checkpoint, or damaged (")
    assert (
        second == f"Going on from {tmp_path}/model_0000019.pth, the newest checkpoint that is whole"
    )


def test_the_iteration_of_a_checkpoint_without_number_is_in_it(tmp_path):
    save(tmp_path, 9, 19, 49)
    save(tmp_path, 29, name="model_final")
    save(tmp_path, 19, name="model_best")
    (tmp_path / "last_checkpoint").write_text("model_0000049.pth")
    for damaged, expected in (
        (["model_0000049"], 29),
        (["model_final"], 19),
        (["model_0000019"], 19),
        (["model_best"], 9),
    ):
        for name in damaged:
            (tmp_path / f"{name}.pth").write_bytes(b"")
        assert resumed(tmp_path) == expected


@pytest.mark.parametrize(
    "named", ["model_0000099.pth", "", "\0", b"\xff\xfe", None], ids=lambda named: repr(named)
)
def test_a_last_checkpoint_that_is_not_there(tmp_path, caplog, named):
    save(tmp_path, 9, 19)
    path = tmp_path / "last_checkpoint"
    path.unlink()
    if named is not None:
        path.write_bytes(named if isinstance(named, bytes) else named.encode())
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 19
    assert "last_checkpoint: there is no" in caplog.messages[0]


def test_none_that_is_whole_is_one_line(tmp_path):
    save(tmp_path, 9, 19)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="none of its checkpoints is whole") as error:
        resumed(tmp_path)
    assert "\n" not in str(error.value)


def test_another_models_checkpoint_is_refused_not_skipped(tmp_path):
    save(tmp_path, 9)
    checkpointer(tmp_path, 19, size=5).save("model_0000019", iteration=19)
    with pytest.raises(UserError, match=r"model_0000019\.pth: weight has shape \[1, 5\], but"):
        resumed(tmp_path)


def test_weights_that_are_no_numbers_are_refused_not_skipped(tmp_path):
    save(tmp_path, 9)
    broken = checkpointer(tmp_path, 19)
    nn.init.constant_(broken.model.bias, float("nan"))
    broken.save("model_0000019", iteration=19)
    with pytest.raises(UserError, match=r"model_0000019\.pth: bias is infinite or nan"):
        resumed(tmp_path)


def test_without_any_checkpoint_training_begins(tmp_path):
    assert resumed(tmp_path) == -1


def test_any_damage_leads_to_the_one_before_or_does_no_harm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    save(folder, 9, 19)
    path = folder / "model_0000019.pth"
    whole = path.read_bytes()

    @settings(max_examples=60)
    @given(st.integers(0, len(whole) - 1), st.binary(max_size=9))
    def check(place: int, content: bytes) -> None:
        path.write_bytes(whole[:place] + content + whole[place + max(1, len(content)) :])
        assert resumed(folder) in (9, 19)

    check()


# The command line


def options(output: Path, iterations: int) -> list:
    return [
        *("--config-file", CONFIG, *SMALL, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", output),
        *("SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"),
    ]


@pytest.mark.slow
def test_training_goes_on_from_the_newest_whole_checkpoint(shapes, tmp_path):
    run = train_net(*options(tmp_path, 4))
    assert run.returncode == 0, run.stderr[-3000:]
    for name in ("model_final.pth", "model_0000003.pth"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1000])
    before = (tmp_path / "model_0000001.pth").read_bytes()

    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", sys.executable, "train_net.py", "--resume"]
        + [str(word) for word in (*options(tmp_path, 4), "MODEL.DEVICE", "cpu")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 2, limited.stderr[-3000:]
    assert "Starting training from iteration 2" in limited.stdout
    line = limited.stderr.strip().splitlines()[-1]
    assert line.startswith("train_net.py: error: ")
    assert "model_0000003.pth: cannot be written (File too large)" in line
    assert "Traceback" not in limited.stdout + limited.stderr
    assert (tmp_path / "model_0000001.pth").read_bytes() == before
    assert not [*tmp_path.glob("*.partial")]

    run = train_net("--resume", "--num-gpus", 2, *options(tmp_path, 4))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Starting training from iteration 2" in run.stdout + run.stderr

    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    evaluation = *options(tmp_path, 4)[:-1], "('shapes_val',)"
    run = train_net("--resume", "--eval-only", *evaluation)
    assert run.returncode == 2, run.stderr[-3000:]
    assert "none of its checkpoints is whole" in run.stderr.strip().splitlines()[-1]
