"""Pictures of predictions in TensorBoard: they show what they say, and change no training."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from panoptic_fpn_ext.engine import Trainer, launch

from ..conftest import on_cpu
from ..evaluation.test_pictures import panels

pytestmark = on_cpu


@pytest.fixture
def cfg(training_cfg: CfgNode) -> CfgNode:
    training_cfg.DATASETS.TEST, training_cfg.INPUT.MIN_SIZE_TEST = ("shapes_val",), 64
    training_cfg.SEED = 3
    return training_cfg


def written(folder: str | Path) -> dict[str, dict[int, np.ndarray]]:
    """The pictures in TensorBoard's files: name, iteration, (H, W, 3)."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {
        name: {
            event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            for event in events.Images(name)
        }
        for name in events.Tags()["images"]
    }


def test_pictures_of_each_evaluation_and_the_same_weights(cfg, tmp_path):
    """With 2 pictures and with none; on images in the order of the dataset."""
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 5, 2
    states, metrics = [], []
    for number in (2, 0):
        cfg.TEST.PICTURES, cfg.OUTPUT_DIR = number, str(tmp_path / str(number))
        torch.manual_seed(0)
        training = Trainer(cfg)
        training.train()
        states.append(training.model.state_dict())
        metrics.append((tmp_path / str(number) / "inference" / "metrics.json").read_text())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert metrics[0] == metrics[1]
    assert written(tmp_path / "0") == {}
    found = written(tmp_path / "2")
    records = DatasetCatalog.get("shapes_val")[:2]
    stems = [Path(record["file_name"]).stem for record in records]
    assert list(found) == [f"predictions/shapes_val/{k + 1}_{stems[k]}" for k in range(2)]
    for record, by_iteration in zip(records, found.values(), strict=True):
        assert list(by_iteration) == [1, 3, 5]
        for picture in by_iteration.values():
            image, prediction, truth = panels(picture)
            original = Image.open(record["file_name"]).convert("RGB")
            small = np.asarray(Image.fromarray(image).resize(original.size, Image.Resampling.BOX))
            assert np.abs(small.astype(int) - np.asarray(original)).mean() < 5
            assert not np.array_equal(prediction, truth)


@pytest.mark.parametrize("architecture", ["SemanticFPN", "GeneralizedRCNN"])
def test_networks_of_one_task(cfg, architecture, tmp_path):
    cfg.MODEL.META_ARCHITECTURE, cfg.TEST.PICTURES = architecture, 1
    Trainer(cfg).train()
    ((picture,),) = (list(p.values()) for p in written(tmp_path).values())
    assert len(panels(picture)) == 3


def _train(cfg: CfgNode) -> None:
    torch.set_num_threads(1)
    Trainer(cfg).train()


@pytest.mark.slow
def test_in_several_processes_the_first_one_draws(cfg, tmp_path):
    cfg.TEST.PICTURES = 2
    launch(_train, 2, args=(cfg,), device="cpu")
    assert len(written(tmp_path)) == 2
