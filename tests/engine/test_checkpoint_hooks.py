"""Which checkpoints a training keeps."""

import logging
from pathlib import Path

import pytest
import torch

from ..conftest import CPU
from .test_saving import checkpointer, contents, resumed, save


@pytest.fixture
def device() -> torch.device:
    """Files are the same everywhere."""
    return CPU


def names(folder: Path) -> set[str]:
    return {path.stem.removeprefix("model_").lstrip("0") for path in folder.glob("model_*.pth")}


# The newest


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_are_kept_and_those_without_a_number(tmp_path, keep):
    save(tmp_path, 9, 19, 29, 100, 39)
    save(tmp_path, 100, name="model_final")
    save(tmp_path, 9, name="model_best")
    (tmp_path / "model_mine_0000003.txt").write_text("notes")
    checkpointer(tmp_path).keep_newest(keep, 39)
    newest = {"39", "29", "19", "9"} if keep > 3 else set(["39", "29", "19"][:keep])
    assert names(tmp_path) == {"final", "best", "100", *newest}  # 100 is not reached yet
    assert (tmp_path / "model_mine_0000003.txt").exists()


@pytest.mark.parametrize("damage", [slice(0, 0), slice(0, -1), slice(0, 500)])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_does_not_count(tmp_path, caplog, keep, damage):
    """Whatever is removed, a whole one is there to go on from."""
    save(tmp_path, 9, 19, 29, 39)
    path = tmp_path / "model_0000039.pth"
    path.write_bytes(path.read_bytes()[damage])
    checkpointer(tmp_path).keep_newest(keep, 39)
    assert names(tmp_path) == {"39", *["29", "19"][:keep]}
    assert f"{path}: damaged" in caplog.text
    assert resumed(tmp_path) == 29


def test_damage_since_the_last_look_is_seen(tmp_path):
    keeping = checkpointer(tmp_path)
    save(tmp_path, 9, 19)
    keeping.keep_newest(1, 19)
    assert names(tmp_path) == {"19"}
    save(tmp_path, 29)
    path = tmp_path / "model_0000019.pth"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    keeping.keep_newest(2, 29)
    save(tmp_path, 39)
    keeping.keep_newest(2, 39)
    assert names(tmp_path) == {"29", "39"}  # nobody has to go on from 19


def test_the_only_whole_one_stays(tmp_path):
    save(tmp_path, 9, 19, 29)
    for number in (19, 29):
        (tmp_path / f"model_{number:07d}.pth").write_bytes(b"")
    checkpointer(tmp_path).keep_newest(1, 29)
    assert resumed(tmp_path) == 9


def test_after_falling_back_a_damaged_later_one_costs_nothing(tmp_path):
    """A training that goes on from 19 with another period."""
    save(tmp_path, 9, 19, 29)
    (tmp_path / "model_0000029.pth").write_bytes(b"")
    assert resumed(tmp_path) == 19
    save(tmp_path, 24)
    checkpointer(tmp_path).keep_newest(1, 24)
    assert names(tmp_path) == {"24", "29"}
    assert resumed(tmp_path) == 24


def test_only_the_process_that_saves_removes(tmp_path):
    save(tmp_path, 9, 19)
    other = checkpointer(tmp_path)
    other.save_to_disk = False
    before = contents(tmp_path)
    other.keep_newest(1, 19)
    assert contents(tmp_path) == before


def test_what_cannot_be_removed_stops_no_training(tmp_path, caplog, monkeypatch):
    save(tmp_path, 9, 19)

    def refuse(path: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.unlink", refuse)
    with caplog.at_level(logging.WARNING):
        checkpointer(tmp_path).keep_newest(1, 19)
    assert "model_0000009.pth: cannot be removed (Operation not permitted)" in caplog.text


# The best


def test_the_best_is_not_the_last(tmp_path):
    save(tmp_path, 9, 19)
    save(tmp_path, 29, name="model_best")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000019.pth"
    assert resumed(tmp_path) == 19
