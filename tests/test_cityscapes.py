"""Cityscapes from end to end, on Shapes in its layout: preparation, training, scores."""

import importlib.util
import json
import os
from pathlib import Path

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as pixel_level
import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor, default_argument_parser
from PIL import Image

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.engine import setup

from .conftest import REPOSITORY, SMALL, train_net

CONFIG = "configs/Cityscapes-PanopticSegmentation/quickstart.yaml"

_spec = importlib.util.spec_from_file_location(
    "prepare_cityscapes", REPOSITORY / "datasets" / "prepare_cityscapes.py"
)
prepare_cityscapes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare_cityscapes)


@pytest.fixture(scope="session")
def cityscapes() -> Path:
    """A tiny Shapes in the layout of Cityscapes, prepared, where its datasets expect it."""
    from make_shapes import make_shapes

    root = Path(os.environ["DETECTRON2_DATASETS"]) / "shapes_cityscapes"
    make_shapes(root, layout="cityscapes", size=(64, 128), num_images={"train": 12, "val": 8})
    assert prepare_cityscapes.main([str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def trained(cityscapes, tmp_path_factory) -> Path:
    """The output folder of a training run of 12 iterations."""
    output = tmp_path_factory.mktemp("cityscapes_trained")
    run = train_net("--config-file", CONFIG, *SMALL, "SOLVER.MAX_ITER", "12", "OUTPUT_DIR", output)
    assert run.returncode == 0, run.stderr[-3000:]
    return output


def scores(output: Path) -> dict[str, float]:
    return json.loads((output / "inference" / "metrics.json").read_text())


def test_training_writes_the_scores_of_cityscapes(trained):
    found = scores(trained)
    keys = {"panoptic_seg/PQ", "sem_seg/mIoU", "segm/AP", "segm/AP50"}
    keys |= {f"sem_seg/{key}" for key in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")}
    assert keys <= set(found)
    assert all(0 <= found[key] <= 100 for key in keys)
    assert found["sem_seg/IoU"] == pytest.approx(found["sem_seg/mIoU"])
    assert found["sem_seg/mIoU"] > 0


def test_two_processes_give_the_same_scores(trained, tmp_path):
    run = train_net(
        *("--config-file", CONFIG, "--eval-only", "--num-gpus", 2, *SMALL),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert scores(tmp_path) == scores(trained)


def test_the_predictor_takes_the_checkpoint(trained, cityscapes):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(trained / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    record = DatasetCatalog.get("shapes_cityscapes_val")[0]
    outputs = DefaultPredictor(cfg)(cv2.imread(record["file_name"]))
    panoptic_seg, segments_info = outputs["panoptic_seg"]
    assert panoptic_seg.shape == (64, 128)
    # Classes of things never become stuff.
    assert all(s["category_id"] < 11 for s in segments_info if not s["isthing"])


def test_the_records_are_those_of_the_label_images(cityscapes):
    """What training reads agrees with the labelTrainIds of the same images, but for void."""
    for record in DatasetCatalog.get("shapes_cityscapes_train"):
        assert np.asarray(Image.open(record["file_name"])).shape == (64, 128, 3)
        gt = record["file_name"].replace("leftImg8bit/train", "gtFine/train")
        train_ids = np.asarray(Image.open(gt.replace("leftImg8bit", "gtFine_labelTrainIds")))
        png = np.asarray(Image.open(record["pan_seg_file_name"]), int) @ [1, 256, 65536]
        for segment in record["segments_info"]:
            label = 11 + segment["category_id"] if segment["isthing"] else segment["category_id"]
            assert (train_ids[png == segment["id"]] == label).all()
        assert ((train_ids == 255) == (png == 0)).all()


def test_cityscapesscripts_makes_the_same_label_images_from_the_polygons(cityscapes, tmp_path):
    before = {path: path.read_bytes() for path in cityscapes.rglob("*TrainIds.png")}
    assert len(before) == 20
    for path in before:
        path.unlink()
    assert prepare_cityscapes.main([str(cityscapes), "--label-train-ids"]) == 0
    for path, content in before.items():
        assert (
            np.asarray(Image.open(path))
            == cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
        ).all()


def test_cityscapesscripts_evaluates_the_tree(cityscapes, monkeypatch):
    """The truth, as a prediction, is perfect in its program."""
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # gone in NumPy 2.4
    truths = [str(path) for path in sorted(cityscapes.glob("gtFine/val/*/*_labelIds.png"))]
    args = pixel_level.args
    args.quiet, args.JSONOutput = True, False
    results = pixel_level.evaluateImgLists(truths, truths, args)
    assert results["averageScoreClasses"] == results["averageScoreInstClasses"] == 1


@pytest.mark.parametrize("where", ["argument", "CITYSCAPES_DATASET", "DETECTRON2_DATASETS"])
def test_preparation_without_a_tree_is_one_line(tmp_path, monkeypatch, capsys, where):
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    root = tmp_path / "cityscapes"
    if where != "argument":
        monkeypatch.setenv(where, str(tmp_path if where.startswith("DETECTRON2") else root))
    assert prepare_cityscapes.main([str(root)] if where == "argument" else []) == 2
    error = capsys.readouterr().err
    assert f"no {root}/leftImg8bit/train/" in error and "leftImg8bit_trainvaltest.zip" in error
    assert error.count("\n") == 1
    assert not root.exists()


def test_training_without_preparation_says_where_to_read():
    config = "configs/Cityscapes-PanopticSegmentation/panoptic_fpn_R_50.yaml"
    args = default_argument_parser().parse_args(["--config-file", str(REPOSITORY / config)])
    with pytest.raises(UserError, match=r"cityscapes_fine_panoptic_fpn_val.* datasets/README\.md"):
        setup(args)
