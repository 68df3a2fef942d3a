"""Datasets of stuff alone, of things alone, of one class, one image, one pixel, through it all."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor

from panoptic_fpn_ext.data.checks import check_panoptic_dataset
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png
from panoptic_fpn_ext.engine import Trainer, setup

from .conftest import CONFIG, REPOSITORY, SMALL, train_net
from .data.tiny_dataset import TinyDataset

SKY_CATEGORY, CAR_CATEGORY, PERSON_CATEGORY = 3, 7, 9


def dataset(root: Path, categories: set[int], num_images: int = 2) -> TinyDataset:
    """The tiny dataset without other categories; their pixels are void."""
    data = TinyDataset(root, num_images)
    listed = [c for c in data.panoptic["categories"] if c["id"] in categories]
    for annotation in data.panoptic["annotations"]:
        segments = annotation["segments_info"]
        annotation["segments_info"] = [s for s in segments if s["category_id"] in categories]
        png = data.png(annotation["image_id"])
        ids = read_panoptic_png(png)
        kept = [s["id"] for s in annotation["segments_info"]]
        write_panoptic_png(png, np.where(np.isin(ids, kept), ids, 0))
    instances = data.instances["annotations"]
    data.panoptic["categories"] = listed
    data.instances = {
        **data.panoptic,
        "annotations": [a for a in instances if a["category_id"] in categories],
        "categories": [c for c in listed if c["isthing"]],
    }
    data.write()
    return data


def config(data: TinyDataset, *, instances: bool = False) -> Path:
    paths = {key: str(path) for key, path in data.paths(instances).items()}
    path = data.root / "config.yaml"
    content = {
        "_BASE_": str(REPOSITORY / CONFIG),
        "DATASETS": {
            "PANOPTIC": [{"name": data.root.name, **paths}],
            "TRAIN": [data.root.name],
            "TEST": [data.root.name],
        },
        "SOLVER": {"MAX_ITER": 2, "STEPS": [], "IMS_PER_BATCH": 2},
        "MODEL": {"DEVICE": "cpu"},
        "OUTPUT_DIR": str(data.root / "output"),
    }
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def tool(name: str, *arguments: str | Path) -> None:
    run = subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("instances", [False, True], ids=["png", "json"])
@pytest.mark.parametrize("kind", ["stuff", "things"])
def test_stuff_or_things_alone_through_every_command(tmp_path, kind, instances):
    categories = {"stuff": {SKY_CATEGORY}, "things": {CAR_CATEGORY, PERSON_CATEGORY}}[kind]
    data = dataset(tmp_path / f"only_{kind}_{instances}", categories)
    paths = data.paths(instances)
    file, output = config(data, instances=instances), data.root / "output"
    assert not check_panoptic_dataset(**paths).faults

    run = train_net("--config-file", file, *SMALL)
    assert run.returncode == 0, run.stderr[-3000:]
    assert ("loss_rpn_cls" in run.stdout) == (kind == "things")
    weights = "MODEL.WEIGHTS", output / "model_final.pth"
    parameters = torch.load(output / "model_final.pth", weights_only=False)["model"]
    assert any(name.startswith("roi_heads") for name in parameters) == (kind == "things")

    options = *weights, "TEST.SUBMISSION", "True"
    run = train_net("--config-file", file, "--eval-only", *SMALL, *options)
    assert run.returncode == 0, run.stderr[-3000:]
    scores = json.loads((output / "inference" / "metrics.json").read_text())
    absent = "th" if kind == "stuff" else "st"
    assert scores["panoptic_seg/PQ"] is not None and scores[f"panoptic_seg/PQ_{absent}"] is None
    assert ("segm/AP" in scores) == (kind == "things")
    if instances:
        return
    tool("tune_merging", "--config-file", file, "--workers", "1", *weights)
    tool("draw_predictions", "--config-file", file, "--output", tmp_path / "drawn.png", *weights)


SMALLEST = {
    "one stuff class": lambda root: dataset(root, {SKY_CATEGORY}),
    "one thing class": lambda root: dataset(root, {CAR_CATEGORY}),
    "one image": lambda root: dataset(root, {SKY_CATEGORY, CAR_CATEGORY}, num_images=1),
    "one pixel": lambda root: one_pixel(dataset(root, {SKY_CATEGORY, CAR_CATEGORY})),
}


def one_pixel(data: TinyDataset) -> TinyDataset:
    import cv2

    for image, annotation in zip(
        data.panoptic["images"], data.panoptic["annotations"], strict=True
    ):
        image["height"] = image["width"] = 1
        path = str(data.images / image["file_name"])
        cv2.imwrite(path, cv2.imread(path)[:1, :1])
        segment = annotation["segments_info"][0]
        segment.update(area=1, bbox=[0, 0, 1, 1])
        annotation["segments_info"] = [segment]
        write_panoptic_png(data.png(image["id"]), np.full((1, 1), segment["id"]))
    data.write()
    return data


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_datasets_are_trained_on_and_evaluated(tmp_path, name):
    data = SMALLEST[name](tmp_path / name.replace(" ", "_"))
    options = argparse.Namespace(
        config_file=str(config(data)), opts=SMALL, eval_only=False, resume=False
    )
    try:
        cfg = setup(options)
        trainer = Trainer(cfg)
        trainer.train()
        scores = trainer._last_eval_results
        assert 0 <= scores["panoptic_seg"]["PQ"] <= 100 and 0 <= scores["sem_seg"]["mIoU"] <= 100
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
        ids, segments = DefaultPredictor(cfg)(np.zeros((1, 3, 3), np.uint8))["panoptic_seg"]
        assert ids.shape == (1, 3) and {s["id"] for s in segments} >= set(ids.unique().tolist()) - {
            0
        }
    finally:
        DatasetCatalog.remove(data.root.name)
        MetadataCatalog.remove(data.root.name)
