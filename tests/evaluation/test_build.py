"""Which evaluators a dataset gets, and where their scores go."""

import json

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.evaluation import (
    EVALUATOR_REGISTRY,
    build_evaluator,
    evaluator_builders,
    needs,
)

DATASET = "evaluation_build_test"


def config(**keys) -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.fixture
def metadata():
    yield MetadataCatalog.get(DATASET).set(
        thing_classes=["cat"], stuff_classes=["things", "sky"], thing_sem_seg_ids=(0,)
    )
    MetadataCatalog.remove(DATASET)


def names(cfg: CfgNode) -> list[str]:
    return [build.__name__ for build in evaluator_builders(cfg, DATASET)]


def test_a_dataset_names_its_evaluators(metadata):
    assert names(config()) == ["panoptic_seg", "sem_seg", "instances"]
    metadata.evaluators = ("instances", "panoptic_seg")
    assert names(config()) == ["instances", "panoptic_seg"]


def test_outputs_that_are_off_are_not_evaluated(metadata):
    assert names(config(MODEL__PANOPTIC_FPN__OUTPUTS=["sem_seg"])) == ["sem_seg"]


def test_a_registered_evaluator_is_used(metadata, tmp_path):
    class Counter(DatasetEvaluator):
        def evaluate(self) -> dict:
            return {"count": {"of": 3.0}}

    @needs("sem_seg")
    def counter(dataset_name: str, output_folder: str) -> DatasetEvaluator:
        assert (dataset_name, output_folder) == (DATASET, str(tmp_path))
        return Counter()

    EVALUATOR_REGISTRY.register(counter)
    try:
        metadata.evaluators = ("counter",)
        results = build_evaluator(config(), DATASET, str(tmp_path)).evaluate()
    finally:
        del EVALUATOR_REGISTRY._obj_map["counter"]
    assert results == {"count": {"of": 3.0}}


def test_mistakes_are_named(metadata):
    with pytest.raises(UserError, match=r"TEST.EVALUATORS 'coco': allowed are"):
        evaluator_builders(config(TEST__EVALUATORS="coco"), DATASET)
    with pytest.raises(UserError, match="TEST.SUBMISSION needs panoptic_seg"):
        cfg = config(TEST__SUBMISSION=True, MODEL__PANOPTIC_FPN__OUTPUTS=["sem_seg"])
        evaluator_builders(cfg, DATASET)
    metadata.evaluators = ("panoptic",)
    with pytest.raises(UserError, match=r"no evaluator 'panoptic' in panoptic_fpn_ext; it has"):
        evaluator_builders(config(), DATASET)


def test_panopticapi_is_asked_for(metadata, monkeypatch):
    monkeypatch.setattr("panoptic_fpn_ext.evaluation.build.find_spec", lambda name: None)
    cfg = config(TEST__EVALUATORS="detectron2")
    with pytest.raises(UserError, match=r"panoptic_seg needs panopticapi, .*: pip install git\+"):
        evaluator_builders(cfg, DATASET)
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = ["sem_seg", "instances"]
    assert names(cfg) == ["sem_seg", "instances"]


def test_scores_of_training_reach_log_and_tensorboard(trained):
    scores = json.loads((trained / "inference" / "metrics.json").read_text())
    written = EventAccumulator(str(trained)).Reload()
    assert scores.keys() <= set(written.Tags()["scalars"])
    for key, value in scores.items():
        if value is not None:
            assert written.Scalars(key)[-1].value == pytest.approx(value, rel=1e-6)
    log = (trained / "log.txt").read_text()
    for title in ("Panoptic Evaluation Results", "Semantic Segmentation Evaluation Results"):
        assert title in log
    lines = (trained / "metrics.json").read_text().splitlines()
    assert scores.keys() <= json.loads(lines[-1]).keys()
