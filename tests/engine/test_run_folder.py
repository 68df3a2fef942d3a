"""What a run leaves in its folder, and what it leaves alone."""

import argparse
import io
import logging
import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.config import resolve_config
from panoptic_fpn_ext.engine import run_folder

from ..conftest import CONFIG, SMALL, train_net


def config(folder: Path):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def _hold(folder, held, release):
    with run_folder.owned(folder, resume=False, overwrite=False):
        held.set()
        release.wait()


def test_a_folder_belongs_to_one_process_until_that_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(60)
    for words in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with (
            pytest.raises(UserError, match="another training is running there"),
            run_folder.owned(tmp_path, **words),
        ):
            pass
    process.kill()
    process.join()
    with run_folder.owned(tmp_path, resume=True, overwrite=False):
        pass


@pytest.mark.parametrize("name", ["last_checkpoint", "model_0000099.pth", "model_final.pth"])
def test_a_training_is_replaced_only_if_that_is_said(tmp_path, name):
    (tmp_path / name).touch()
    with (
        pytest.raises(UserError, match=r"--resume, replace it by --overwrite, or choose another"),
        run_folder.owned(tmp_path, resume=False, overwrite=False),
    ):
        pass
    for words in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with run_folder.owned(tmp_path, **words):
            assert (tmp_path / name).exists()


def test_a_replaced_training_leaves_nothing_and_the_rest_stays(tmp_path):
    old = "last_checkpoint", "model_0000009.pth", "events.out.tfevents.1", "metrics.json"
    for name in (*old, "log.txt", "weights.pth", "notes.md"):
        (tmp_path / name).write_text("old")
    files = run_folder.files_of_training(tmp_path)
    assert {path.name for path in files} == set(old)
    with (tmp_path / "metrics.json").open("a") as metrics:  # as the new training has it
        (tmp_path / "events.out.tfevents.2").touch()
        run_folder.remove(files)
        metrics.write("new")
    assert (tmp_path / "metrics.json").read_text() == "new"
    left = {path.name for path in tmp_path.iterdir()} - {"metrics.json"}
    assert left == {"log.txt", "weights.pth", "notes.md", "events.out.tfevents.2"}


def test_the_config_is_written_whole(tmp_path):
    cfg = config(tmp_path)
    run_folder.write_config(cfg, tmp_path / "new" / "folder")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == "config.yaml" and yaml.safe_load(path.read_text())["OUTPUT_DIR"]


def test_only_what_is_worth_reading_is_on_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    loggers = [logging.getLogger(name) for name in run_folder.LOGGERS]
    before = [(log.handlers, log.level, log.propagate) for log in loggers]
    try:
        for log in loggers:
            log.handlers = []
        run_folder.setup_logger.cache_clear()
        args = argparse.Namespace(eval_only=False, config_file="some.yaml")
        run_folder.prepare_process(config(tmp_path), args)
        logging.getLogger("panoptic_fpn_ext.anything").info("worth reading")
        terminal, file = sys.stdout.getvalue(), (tmp_path / "log.txt").read_text()
    finally:
        run_folder.setup_logger.cache_clear()
        for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
            log.handlers, log.level, log.propagate = handlers, level, propagate
    assert "some.yaml" in terminal and "worth reading" in terminal
    assert len(terminal.splitlines()) < 6
    for line in ("worth reading", "detectron2 ", "MAX_ITER: 40000"):
        assert line in file


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_deterministic_runs_choose_ways_of_computing(tmp_path, monkeypatch, deterministic):
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: calls.append(on))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(run_folder, "setup_logger", lambda *_, name: logging.getLogger(name))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    cfg = config(tmp_path)
    cfg.SEED, cfg.CUDNN_BENCHMARK, cfg.DETERMINISTIC = 1, True, deterministic
    run_folder.prepare_process(cfg, argparse.Namespace(eval_only=False))
    assert calls == [True] * deterministic
    assert torch.backends.cudnn.benchmark is not deterministic


def test_deterministic_runs_have_a_seed(tmp_path):
    cfg = config(tmp_path)
    cfg.DETERMINISTIC = True
    with pytest.raises(UserError, match="DETERMINISTIC True has no effect without SEED"):
        resolve_config(cfg)


@pytest.mark.slow
def test_a_refused_run_and_an_evaluation_leave_the_config_alone(train, tmp_path):
    trained = shutil.copytree(train("cpu"), tmp_path / "trained")
    files = [path for path in trained.iterdir() if path.is_file() and path.name != "log.txt"]
    before = {path: path.read_bytes() for path in files}
    again = ("--config-file", CONFIG, *SMALL, "OUTPUT_DIR", trained)
    weights = "MODEL.WEIGHTS", trained / "model_final.pth"
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    for status, arguments in (
        (2, again),
        (2, ("--overwrite", *again, "MODEL.SEM_SEG_HEAD.AGGREGATION", "max")),
        (2, ("--overwrite", *again, "MODEL.WEIGHTS", broken)),
        (0, ("--eval-only", *again, *weights, "MODEL.PANOPTIC_FPN.OUTPUTS", "['sem_seg']")),
    ):
        run = train_net(*arguments)
        assert run.returncode == status, run.stderr[-3000:]
        for path, content in before.items():
            assert path.read_bytes() == content, (path, arguments)
    evaluated = yaml.safe_load((trained / "inference" / "config.yaml").read_text())
    assert evaluated["MODEL"]["PANOPTIC_FPN"]["OUTPUTS"] == ["sem_seg"]
