"""The command line, end to end, on a tiny Shapes."""

import json
from pathlib import Path

import pytest

from .conftest import CONFIG, SMALL, train_net


def scores(output: Path) -> dict[str, float]:
    return json.loads((output / "inference" / "metrics.json").read_text())


def test_training_writes_checkpoint_config_log_and_scores(trained):
    for name in ("model_final.pth", "config.yaml", "log.txt", "metrics.json"):
        assert (trained / name).is_file()
    found = scores(trained)
    for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert 0 <= found[f"panoptic_seg/{key}"] <= 100
    assert found["panoptic_seg/PQ_st"] > 0
    assert {"sem_seg/mIoU", "sem_seg/fwIoU", "segm/AP", "bbox/AP"} <= set(found)


@pytest.mark.parametrize("processes", [1, 2])
def test_eval_only_repeats_the_scores_in_any_number_of_processes(trained, tmp_path, processes):
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--num-gpus", processes, *SMALL),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path) == scores(trained)


def test_the_written_config_is_enough_to_evaluate(trained, tmp_path):
    weights = trained / "model_final.pth"
    run = train_net(
        *("--config-file", trained / "config.yaml", "--eval-only"),
        *("MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path, "MODEL.PANOPTIC_FPN.OUTPUTS"),
        "['panoptic_seg']",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path)["panoptic_seg/PQ"] == scores(trained)["panoptic_seg/PQ"]
    assert not any(key.startswith(("sem_seg", "segm", "bbox")) for key in scores(tmp_path))


def test_training_in_two_processes_resumes(shapes, tmp_path):
    arguments = ("--config-file", CONFIG, "--num-gpus", 2, "--resume", *SMALL)
    for iterations in (2, 4):
        run = train_net(*arguments, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]
    assert "Starting training from iteration 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "--config-file nowhere.yaml: no such file"),
        (["--config-file", CONFIG, "SOLVER.OPTIMIZER", "LION"], "allowed are ['SGD', 'ADAMW']"),
    ],
)
def test_mistakes_get_one_line_and_status_2(shapes, tmp_path, arguments, message):
    run = train_net(*arguments, "OUTPUT_DIR", tmp_path)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("train_net.py: error: ")
    assert message in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert not any(tmp_path.iterdir())  # nothing was written before
