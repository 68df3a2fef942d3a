"""Which checkpoints a training keeps, and when it stops."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from panoptic_fpn_ext.engine import Trainer
from panoptic_fpn_ext.engine.checkpoint_hooks import KeepBest

from ..conftest import CONFIG, CPU, REPOSITORY, SMALL
from ..tools.test_check_resume import tool
from .test_saving import checkpointer, contents, resumed, save

leaves, same = tool.leaves, tool.same


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


# In trainings whose scores are given


SCORES = [1.0, 3.0, 2.0, 3.0, 2.5, 7.0, 8.0]


@pytest.fixture
def cfg(training_cfg, caplog):
    """An evaluation every two iterations, after which a checkpoint is saved before."""
    training_cfg.TEST.EVAL_PERIOD, training_cfg.SOLVER.CHECKPOINT_PERIOD = 2, 2
    training_cfg.TEST.BEST_METRIC, training_cfg.SOLVER.MAX_ITER = "panoptic_seg/PQ", 12
    training_cfg.SEED, training_cfg.INPUT.MIN_SIZE_TRAIN = 3, (32,)
    caplog.set_level(logging.INFO, "panoptic_fpn_ext")
    return training_cfg


class Dies(HookBase):
    """As a process that is killed: nothing is done after."""

    def __init__(self, when: str, iteration: int) -> None:
        self.when, self.iteration = when, iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Killed


class Killed(Exception):
    pass


class Small(nn.Module):
    """A model that trains in no time, on the mean colours of images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        colours = torch.stack([image["image"].float().mean((1, 2)) for image in batch])
        return {"loss": self.norm(self.linear(colours / 255)).square().mean()}


class Given(Trainer):
    """A trainer of that, whose evaluations are instant: SCORES by the iterations they are of."""

    scores: ClassVar[list] = SCORES
    judged: ClassVar[list[int]] = []
    dies_in_evaluation = -1

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Small()

    def _test_and_go_on(self) -> dict:
        iteration = min(self.iter, self.max_iter - 1)
        if iteration == self.dies_in_evaluation:
            raise Killed
        Given.judged.append(iteration)
        score = Given.scores[iteration // 2]
        self._last_eval_results = {} if score is None else {"panoptic_seg": {"PQ": score}}
        return self._last_eval_results


def run(cfg: CfgNode, *, dies: tuple[str, int] | None = None) -> Given:
    """Go on with a training, or begin it, until it is over or dies."""
    Given.judged = []
    torch.manual_seed(0)
    training = Given(cfg)
    training.resume_or_load(resume=True)
    if dies is None:
        training.train()
        return training
    when, iteration = dies
    place = next(i for i, hook in enumerate(training._hooks) if isinstance(hook, KeepBest))
    if when == "in evaluation":
        training.dies_in_evaluation = iteration
    else:
        training.register_hooks([Dies(when, iteration)])
        hook = training._hooks.pop()
        training._hooks.insert(place + (when == "after the best"), hook)
    with pytest.raises(Killed):
        training.train()
    return training


def best(folder: Path | str) -> tuple[int, float, str]:
    content = torch.load(Path(folder) / "model_best.pth", weights_only=True)
    assert content["trainer"]["iteration"] == content["iteration"]
    return content["iteration"], content["best"]["score"], content["best"]["metric"]


def last(folder: Path | str) -> str:
    return (Path(folder) / "last_checkpoint").read_text()


def assert_same_file(one: Path, other: Path) -> None:
    found, expected = (torch.load(path, weights_only=True) for path in (one, other))
    assert dict(leaves(found)).keys() == dict(leaves(expected)).keys()
    for (name, value), (_, other_value) in zip(leaves(found), leaves(expected), strict=True):
        assert same(value, other_value), name


def test_the_first_of_the_best_is_kept(cfg, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Given, "scores", [1.0, 3.0, 2.0, 3.0, float("nan"), None])
    run(cfg)
    assert Given.judged == [1, 3, 5, 7, 9, 11]
    assert best(tmp_path) == (3, 3.0, "panoptic_seg/PQ")
    assert last(tmp_path) == "model_final.pth"
    numbered = tmp_path / "model_0000003.pth"
    content = torch.load(tmp_path / "model_best.pth", weights_only=True)
    del content["best"]
    torch.save(content, tmp_path / "model_best.pth")
    assert_same_file(tmp_path / "model_best.pth", numbered)
    assert "panoptic_seg/PQ is nan" in caplog.text
    assert "panoptic_seg/PQ was not found" in caplog.text


def test_the_last_evaluation_may_be_the_best(cfg, tmp_path, monkeypatch):
    """Its checkpoint is of the last iteration, and a longer training can go on from it."""
    monkeypatch.setattr(Given, "scores", [1.0, 2.0, 3.0])
    cfg.SOLVER.MAX_ITER = 5
    run(cfg)
    assert Given.judged == [1, 3, 4]
    assert best(tmp_path)[:2] == (4, 3.0)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_training_that_gets_no_better_stops(cfg, tmp_path, monkeypatch, caplog, patience):
    """As by a naive count; with its checkpoint, and for good."""
    cfg.TEST.PATIENCE = patience
    highest, since, expected = -1.0, 0, []
    for number, score in enumerate(SCORES):
        expected.append(2 * number + 1)
        highest, since = (score, 0) if score > highest else (highest, since + 1)
        if since == patience:
            break
    run(cfg)
    assert Given.judged == expected and expected[-1] < 11
    end = expected[-1]
    assert last(tmp_path) == "model_final.pth"
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == final["trainer"]["iteration"] == end
    assert_same_file(tmp_path / "model_final.pth", tmp_path / f"model_{end:07d}.pth")
    assert f"Training stopped after iteration {end}: no better panoptic_seg/PQ in" in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert logged[-1]["panoptic_seg/PQ"] == SCORES[end // 2]
    (tmp_path / "model_final.pth").rename(tmp_path / "before.pth")
    shutil.copy(tmp_path / "before.pth", tmp_path / "model_final.pth")
    run(cfg)
    assert Given.judged == [end]
    assert_same_file(tmp_path / "before.pth", tmp_path / "model_final.pth")
    cfg.TEST.PATIENCE = 4  # a user who has more goes on
    run(cfg)
    assert Given.judged == [end, *range(end + 2, 12, 2)]


def test_what_is_expected_is_verified_after_an_early_stop_too(cfg):
    cfg.TEST.PATIENCE = 1
    cfg.TEST.EXPECTED_RESULTS = [["panoptic_seg", "PQ", 90.0, 1.0]]
    with pytest.raises(SystemExit):
        run(cfg)


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("when", ["in evaluation", "before the best", "after the best"])
@pytest.mark.parametrize("iteration", [1, 3, 5, 7])
def test_a_training_killed_at_an_evaluation_ends_as_one_that_was_not(
    cfg, tmp_path, when, iteration, patience
):
    cfg.TEST.PATIENCE = patience
    folders = [tmp_path / name for name in ("whole", "killed")]
    cfg.OUTPUT_DIR = str(folders[0])
    run(cfg)
    ends = Given.judged[-1]
    cfg.OUTPUT_DIR = str(folders[1])
    if iteration == ends and when == "after the best":
        pytest.skip("it is over")
    run(cfg, dies=(when, iteration))
    run(cfg)
    assert Given.judged[-1] == ends
    assert best(folders[0]) == best(folders[1])
    for name in ("model_best.pth", "model_final.pth"):
        assert_same_file(folders[0] / name, folders[1] / name)


def test_a_best_that_was_found_after_the_last_checkpoint_is_found_again(cfg, tmp_path):
    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    run(cfg, dies=("after the best", 7))  # the last checkpoint is 4
    assert best(tmp_path)[:2] == (3, 3.0)
    run(cfg)
    assert Given.judged == [5, 7, 9, 11]
    assert best(tmp_path)[:2] == (11, 7.0)


def test_a_training_without_another_checkpoint_goes_on_from_the_best(cfg, tmp_path):
    cfg.SOLVER.CHECKPOINT_PERIOD = 50
    run(cfg, dies=("after the best", 5))
    assert names(tmp_path) == {"best"}
    run(cfg)
    assert Given.judged == [5, 7, 9, 11]


@pytest.mark.parametrize("fault", ["damaged", "missing", "of another metric", "without score"])
def test_without_its_score_the_best_is_sought_anew(cfg, tmp_path, caplog, fault):
    cfg.TEST.PATIENCE = 3
    run(cfg, dies=("after the best", 5))
    path = tmp_path / "model_best.pth"
    content = torch.load(path, weights_only=True)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "missing":
        path.unlink()
    elif fault == "of another metric":
        content["best"]["metric"] = "sem_seg/mIoU"
        torch.save(content, path)
    else:
        del content["best"]
        torch.save(content, path)
    caplog.clear()
    run(cfg)
    assert Given.judged == [5, 7, 9, 11]
    assert best(tmp_path)[:2] == (11, 7.0)
    assert ("the best is sought anew" in caplog.text) == (fault != "missing")


def test_few_checkpoints_and_the_best(cfg, tmp_path):
    cfg.SOLVER.CHECKPOINT_KEEP = 1
    run(cfg, dies=("after the best", 7))
    assert names(tmp_path) == {"7", "best"}
    (tmp_path / "model_0000007.pth").write_bytes(b"")
    run(cfg)  # from the best, of iteration 3
    assert Given.judged[0] == 5
    assert names(tmp_path) == {"11", "best", "final"}
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_KEEP = 14, 2
    run(cfg)
    assert names(tmp_path) == {"11", "13", "best", "final"}


def test_less_is_better_of_losses(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Given,
        "_test_and_go_on",
        lambda self: setattr(
            self, "_last_eval_results", {"validation": {"total_loss": abs(self.iter - 5.0)}}
        ),
    )
    cfg.TEST.BEST_METRIC = "validation/total_loss"
    run(cfg)
    assert best(tmp_path) == (5, 0.0, "validation/total_loss")


# The command line, killed by SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_random_ends_with_the_same_best(shapes, tmp_path):
    run = subprocess.run(
        [
            *(sys.executable, "tools/check_resume.py", "--config-file", CONFIG, "--kills", "2"),
            *("--output", str(tmp_path), *SMALL, "SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "(9,)"),
            *("SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.CHECKPOINT_KEEP", "1", "TEST.LOSS", "True"),
            *("TEST.EVAL_PERIOD", "2", "TEST.BEST_METRIC", "validation/total_loss"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert names(tmp_path / "alone") == names(tmp_path / "killed") == {"11", "best", "final"}
    assert_same_file(tmp_path / "alone" / "model_best.pth", tmp_path / "killed" / "model_best.pth")
