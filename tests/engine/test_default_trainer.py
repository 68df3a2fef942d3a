"""Our models and datasets in Detectron2's own trainer, with its mapper."""

import logging
import os

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config, build_evaluator
from panoptic_fpn_ext.config import ARCHITECTURES

from ..conftest import on_cpu
from ..data.tiny_dataset import TinyDataset

pytestmark = [
    on_cpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture
def cfg(ext_cfg, tmp_path, caplog) -> CfgNode:
    """Without class counts, which follow the dataset."""
    caplog.set_level(logging.INFO, "detectron2")  # else the trainer sets up logging, for good
    add_panoptic_fpn_config(ext_cfg)
    ext_cfg.MODEL.ROI_HEADS.NUM_CLASSES, ext_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80, 54
    ext_cfg.INPUT.MIN_SIZE_TRAIN, ext_cfg.INPUT.MIN_SIZE_TEST = (32,), 32
    ext_cfg.SOLVER.IMS_PER_BATCH, ext_cfg.SOLVER.BASE_LR = 2, 1e-3
    ext_cfg.DATALOADER.NUM_WORKERS = 0
    ext_cfg.OUTPUT_DIR = str(tmp_path)
    return ext_cfg


@pytest.fixture(params=[True, False], ids=["instances json", "panoptic alone"])
def dataset(cfg, tmp_path, request):
    with TinyDataset(tmp_path / "tiny").registered(instances=request.param) as name:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        yield request.param


class WithEvaluator(DefaultTrainer):
    """What a project of Detectron2's adds."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return build_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))


TASKS = {
    "PanopticFPNExt": {"panoptic_seg", "sem_seg", "bbox", "segm"},
    "TwoNetworkPanopticFPN": {"panoptic_seg", "sem_seg", "bbox", "segm"},
    "SemanticFPN": {"sem_seg"},
}
assert TASKS.keys() == set(ARCHITECTURES)


@pytest.mark.parametrize("trainer", [DefaultTrainer, WithEvaluator])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_trains_evaluates_saves_and_resumes(cfg, dataset, architecture, trainer, caplog):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 1, 1
    training = trainer(cfg)
    if not dataset and architecture != "SemanticFPN":
        message = r"\.jpg: no 'instances' to train on: map records with PanopticFPNMapper, .*'anno"
        with pytest.raises(UserError, match=message):
            training.train()
        return
    before = [p.detach().clone() for p in training.model.parameters()]
    training.train()
    assert any((p != q).any() for p, q in zip(training.model.parameters(), before, strict=True))
    expected = TASKS[architecture] if trainer is WithEvaluator else set()
    assert training._last_eval_results.keys() == expected
    assert caplog.text.count("Start inference on 2 batches") == (2 if expected else 0)
    assert "left out" not in caplog.text  # no evaluator failed
    assert trainer is WithEvaluator or "No evaluator found" in caplog.text
    cfg.SOLVER.MAX_ITER = 3
    resumed = trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    resumed.train()


@pytest.mark.parametrize("name", ["instances", "sem_seg"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_there_is_to_train_on_is_asked_for(ext_cfg, training_batch, architecture, name):
    if architecture == "SemanticFPN" and name == "instances":
        pytest.skip("it needs none")
    ext_cfg.MODEL.META_ARCHITECTURE = architecture
    model = build_model(ext_cfg).train()
    del training_batch[1][name]
    needed = {"instances": "annotations", "sem_seg": "sem_seg_file_name"}[name]
    message = f"an image: no '{name}' to train on.* needs '{needed}'"
    with EventStorage(), pytest.raises(UserError, match=message):
        model(training_batch)
