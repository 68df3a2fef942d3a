"""The command line, end to end, on a tiny Shapes."""

import json
import shutil
from operator import itemgetter
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor

from panoptic_fpn_ext import add_panoptic_fpn_config

from .conftest import (
    CONFIG,
    CPU,
    SMALL,
    assert_same_outputs,
    devices,
    moved,
    on_devices,
    train_net,
)

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


def test_training_writes_checkpoint_config_log_and_scores(trained_on_device):
    trained = trained_on_device
    for name in ("model_final.pth", "config.yaml", "log.txt", "metrics.json"):
        assert (trained / name).is_file()
    found = scores(trained)
    for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert 0 <= found[f"panoptic_seg/{key}"] <= 100
    assert found["panoptic_seg/PQ_st"] > 0
    assert {"sem_seg/mIoU", "sem_seg/fwIoU", "segm/AP", "bbox/AP"} <= set(found)


GPUS = range(1, 1 + min(2, torch.cuda.device_count()))
PROCESSES = [(CPU, 1), (CPU, 2)]
PROCESSES += [pytest.param(torch.device("cuda"), n, marks=pytest.mark.gpu) for n in GPUS]


@pytest.mark.parametrize(("device", "processes"), PROCESSES, indirect=["device"])
def test_eval_only_repeats_the_scores_in_any_number_of_processes(
    trained_on_device, tmp_path, processes, device
):
    trained = trained_on_device
    expected = [["panoptic_seg", "PQ", scores(trained)["panoptic_seg/PQ"], 0.01]]
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--num-gpus", processes, *SMALL),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
        *("TEST.EXPECTED_RESULTS", expected),
        device=device.type,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path) == scores(trained)
    assert "Results verification passed" in run.stdout
    found, expected = (
        json.loads((folder / "inference" / "coco_instances_results.json").read_text())
        for folder in (tmp_path, trained)
    )
    keys = itemgetter("image_id", "category_id")
    assert [*map(keys, found)] == [*map(keys, expected)] != []


def test_training_needs_no_validation_set(shapes, tmp_path):
    run = train_net(
        *("--config-file", CONFIG, *SMALL, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"),
        *("OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "training without evaluation" in run.stderr + run.stdout
    assert (tmp_path / "model_final.pth").exists()
    assert not (tmp_path / "inference" / "metrics.json").exists()


def test_no_checkpoint_no_scores(shapes, tmp_path):
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--resume", *SMALL, "OUTPUT_DIR", tmp_path)
    )
    assert run.returncode == 2
    assert "has no checkpoint" in run.stderr.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_eval_only_in_another_precision_has_all_scores(trained, tmp_path, precision):
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", *SMALL, "MODEL.ACCELERATION.PRECISION"),
        *(precision, "MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path).keys() == scores(trained).keys()
    assert ("Fastest for a network" in run.stdout) == (precision == "auto")


def test_eval_only_fails_where_the_scores_are_not_those_expected(trained, tmp_path):
    expected = [["panoptic_seg", "PQ", scores(trained)["panoptic_seg/PQ"] + 1, 0.01]]
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", *SMALL, "TEST.EXPECTED_RESULTS", expected),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 1
    assert "Result verification failed" in run.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_evaluator_costs_no_scores_of_others(trained, shapes, tmp_path, processes):
    """AP needs no panoptic PNG here, the others do."""
    shutil.copytree(shapes / "panoptic_val", tmp_path / "pngs")
    png = max((tmp_path / "pngs").iterdir())
    png.write_bytes(png.read_bytes()[:60])
    dataset = {"name": "damaged", "image_root": shapes / "val", "panoptic_root": tmp_path / "pngs"}
    for kind in ("panoptic", "instances"):
        dataset[f"{kind}_json"] = shapes / "annotations" / f"{kind}_val.json"
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--num-gpus", processes, *SMALL),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
        *("DATASETS.TEST", "('damaged',)", "DATASETS.PANOPTIC"),
        [{key: str(value) for key, value in dataset.items()}],
    )
    assert run.returncode == 2, run.stderr[-3000:]
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("train_net.py: error: evaluation is not complete: Panoptic")
    assert line.count(f"{png}: damaged or truncated PNG") == 2
    assert "Traceback" not in run.stdout + run.stderr
    expected = {k: v for k, v in scores(trained).items() if k.startswith(("bbox", "segm"))}
    assert scores(tmp_path) == expected


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


def test_the_predictor_takes_the_checkpoint_to_any_device(trained, shapes, device):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(trained / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    # After so little training it may be sure of nothing.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.0
    image = cv2.imread(DatasetCatalog.get("shapes_val")[0]["file_name"])
    expected = DefaultPredictor(cfg)(image)
    cfg.MODEL.DEVICE = device.type
    found = DefaultPredictor(cfg)(image)
    assert found["panoptic_seg"][0].device.type == device.type
    assert_same_outputs(moved(found, CPU), expected)


@on_devices(devices(num_gpus=2))
def test_alternate_training_in_two_processes_resumes(shapes, tmp_path, device):
    arguments = ["--config-file", CONFIG, "--num-gpus", 2, "--resume", *SMALL]
    arguments += ["MODEL.PANOPTIC_FPN.TRAINING", "alternate"]
    for iterations in (2, 4):
        options = "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", tmp_path
        run = train_net(*arguments, *options, device=device.type)
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
