"""The command line, end to end, on a tiny Shapes."""

import json
from pathlib import Path

import pytest
import torch

from .conftest import CONFIG, SMALL, train_net

# The published R50 config, which has frozen batch normalization, at toy size.
TOY_R50 = [
    *("--config-file", "configs/COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"),
    *("MODEL.WEIGHTS", "", "SEED", "1", "SOLVER.BASE_LR", "0.0001", *SMALL),
    *("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"),
    *("DATALOADER.NUM_WORKERS", "0", "INPUT.MASK_FORMAT", "bitmask"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
]


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
    expected = [["panoptic_seg", "PQ", scores(trained)["panoptic_seg/PQ"], 0.01]]
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--num-gpus", processes, *SMALL),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
        *("TEST.EXPECTED_RESULTS", expected),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path) == scores(trained)
    assert "Results verification passed" in run.stdout


def test_eval_only_fails_where_the_scores_are_not_those_expected(trained, tmp_path):
    expected = [["panoptic_seg", "PQ", scores(trained)["panoptic_seg/PQ"] + 1, 0.01]]
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", *SMALL, "TEST.EXPECTED_RESULTS", expected),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 1
    assert "Result verification failed" in run.stdout


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


def test_alternate_training_in_two_processes_resumes(shapes, tmp_path):
    arguments = ["--config-file", CONFIG, "--num-gpus", 2, "--resume", *SMALL]
    arguments += ["MODEL.PANOPTIC_FPN.TRAINING", "alternate"]
    for iterations in (2, 4):
        run = train_net(*arguments, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]
    assert "Starting training from iteration 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluations_leave_training_as_it_is(shapes, tmp_path, processes):
    """To the last bit."""
    checkpoints = []
    for period in (0, 2):
        output = tmp_path / str(period)
        run = train_net(
            *("--num-gpus", processes, *TOY_R50, "SOLVER.MAX_ITER", 4),
            *("TEST.EVAL_PERIOD", period, "OUTPUT_DIR", output),
        )
        assert run.returncode == 0, run.stderr[-3000:]
        evaluations = (output / "log.txt").read_text().count("Scores written to")
        assert evaluations == (2 if period else 1)
        checkpoints.append(torch.load(output / "model_final.pth", weights_only=False)["model"])
    without, with_evaluations = checkpoints
    assert without.keys() == with_evaluations.keys()
    for name, value in without.items():
        assert torch.equal(value, with_evaluations[name]), name


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
