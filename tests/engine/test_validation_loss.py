"""The losses on a test dataset: right, the same every time, and nothing is changed by them."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from panoptic_fpn_ext.config import ARCHITECTURES
from panoptic_fpn_ext.data import PanopticFPNMapper
from panoptic_fpn_ext.engine import Trainer, launch
from panoptic_fpn_ext.engine.validation_loss import validation_losses

from ..conftest import on_cpu

pytestmark = on_cpu


@pytest.fixture
def cfg(training_cfg) -> CfgNode:
    training_cfg.DATASETS.TEST = ("shapes_val",)
    training_cfg.INPUT.MIN_SIZE_TEST = 64
    training_cfg.TEST.LOSS = True
    return training_cfg


def randomized(cfg: CfgNode) -> nn.Module:
    """A model whose statistics are not those of any batch."""
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def random_states() -> list:
    python, numpy = random.getstate(), np.random.get_state()
    return [python, numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()]


SEMANTIC = {"loss_sem_seg"}
ALL = SEMANTIC | {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
TERMS = {"PanopticFPNExt": ALL, "TwoNetworkPanopticFPN": ALL, "SemanticFPN": SEMANTIC}
assert TERMS.keys() == set(ARCHITECTURES)
TERMS |= {"PanopticFPN": ALL, "GeneralizedRCNN": ALL - SEMANTIC}  # Detectron2's own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", TERMS)
def test_nothing_is_changed_and_all_terms_are_there(cfg, architecture, training):
    cfg.MODEL.META_ARCHITECTURE = architecture
    if architecture == "PanopticFPN":
        cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    model = randomized(cfg).train(training)
    frozen = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    frozen.training = not training
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    states = random_states()
    with EventStorage(7) as storage:
        found = validation_losses(cfg, model, "shapes_val")
        assert storage.latest() == {} and storage.iter == 7
    assert random_states() == states
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    terms = TERMS[architecture]
    assert found.keys() == {"total_loss", *terms}
    assert found["total_loss"] == pytest.approx(sum(found[name] for name in terms))
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    torch.manual_seed(5)
    model.train(not training)
    assert validation_losses(cfg, model, "shapes_val") == found


def test_the_semantic_loss_is_the_cross_entropy_of_inference(cfg):
    """By PyTorch alone, of the logits that inference returns of images as they are."""
    cfg.MODEL.META_ARCHITECTURE = "SemanticFPN"
    model = randomized(cfg)
    weight = cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT
    mapper = PanopticFPNMapper(cfg, is_train=True, augmentations=[])
    expected = []
    for record in DatasetCatalog.get("shapes_val"):
        mapped = mapper(record)
        with torch.no_grad():
            logits = model.eval()([mapped])[0]["sem_seg"]
        loss = nn.functional.cross_entropy(
            logits[None], mapped["sem_seg"][None], ignore_index=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        )
        expected.append(float(loss))
    found = validation_losses(cfg, model.train(), "shapes_val")
    assert found["loss_sem_seg"] == pytest.approx(weight * sum(expected) / len(expected), rel=1e-4)
    assert len(set(expected)) == 6


def test_alternating_training_has_the_losses_of_both_tasks(cfg):
    joint = build_model(cfg)
    cfg.MODEL.PANOPTIC_FPN.TRAINING = "alternate"
    alternating = build_model(cfg)
    alternating.load_state_dict(joint.state_dict())
    expected = validation_losses(cfg, joint, "shapes_val")
    assert validation_losses(cfg, alternating, "shapes_val") == expected
    assert alternating.training_schedule == "alternate"


def test_training_is_not_disturbed_and_the_losses_are_written(cfg, tmp_path, monkeypatch):
    """Weights after training with and without them are the same; each of several datasets has its
    own."""
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SEED = 4, 2, 3
    states = []
    for with_losses, name in ((True, "with"), (False, "without")):
        cfg.TEST.LOSS, cfg.OUTPUT_DIR = with_losses, str(tmp_path / name)
        torch.manual_seed(0)
        training = Trainer(cfg)
        training.train()
        states.append(training.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    expected = validation_losses(cfg, training.model, "shapes_val")
    scores = json.loads((tmp_path / "with" / "inference" / "metrics.json").read_text())
    found = {k.removeprefix("validation/"): v for k, v in scores.items() if "validation/" in k}
    assert found == pytest.approx(expected)
    lines = (tmp_path / "with" / "metrics.json").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "validation/total_loss" in line]
    assert len(logged) == 2 and logged[-1]["validation/loss_mask"] == found["loss_mask"]
    assert logged[0]["validation/total_loss"] != logged[1]["validation/total_loss"]
    assert "validation" not in (tmp_path / "without" / "metrics.json").read_text()

    monkeypatch.setattr(
        DefaultTrainer, "test", lambda cfg, *args: {name: {} for name in cfg.DATASETS.TEST}
    )
    monkeypatch.setattr(Trainer, "build_evaluator", lambda *args: None)
    cfg.TEST.LOSS, cfg.DATASETS.TEST = True, ("shapes_val", "shapes_train")
    results = Trainer.test(cfg, training.model)
    assert results["shapes_val"]["validation"] == found
    assert results["shapes_train"]["validation"]["total_loss"] != found["total_loss"]


def test_losses_that_are_no_numbers_are_nan_and_said(cfg, caplog):
    model = build_model(cfg)
    nn.init.constant_(model.proposal_generator.rpn_head.conv.bias, float("nan"))
    found = validation_losses(cfg, model, "shapes_val")
    assert math.isnan(found["total_loss"])
    assert "000000000001.jpg: its losses are infinite or nan" in caplog.text


def _losses_of_process(cfg: CfgNode, path: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = validation_losses(cfg, build_model(cfg), "shapes_val")
    if found:
        torch.save(found, path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_find_the_same(cfg, tmp_path, processes):
    """4 do not divide the 6 images."""
    assert len(DatasetCatalog.get("shapes_val")) == 6
    for number in (1, processes):
        path = str(tmp_path / f"{number}.pth")
        if number == 1:
            _losses_of_process(cfg, path)
        else:
            launch(_losses_of_process, number, args=(cfg, path), device="cpu")
    one, several = (torch.load(tmp_path / f"{number}.pth") for number in (1, processes))
    assert several == pytest.approx(one, rel=1e-6)
