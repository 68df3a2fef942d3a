"""Our evaluators against Detectron2's own, on the same dataset and outputs."""

import contextlib
import copy
import io
from importlib.util import find_spec

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from panoptic_fpn_ext import add_panoptic_fpn_config
from panoptic_fpn_ext.evaluation import DETECTRON2_EVALUATOR_REGISTRY, build_evaluator

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OUTPUTS = ["sem_seg", "instances"] + (["panoptic_seg"] if find_spec("panopticapi") else [])


def evaluate(choice: str, dataset_name: str, records, outputs, folder) -> dict[str, float]:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.TEST.EVALUATORS = choice
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = OUTPUTS
    evaluator = build_evaluator(cfg, dataset_name, str(folder))
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="ignore"):
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            # A model's outputs, which Detectron2's evaluators change, are new for each image.
            evaluator.process([record], [copy.deepcopy(output)])
        results = evaluator.evaluate()
    return {f"{task}/{key}": value for task in results for key, value in results[task].items()}


@pytest.mark.parametrize("with_json", [True, False])
def test_both_give_the_same_scores(
    shapes_predictions, shapes_without_json, tmp_path, with_json, monkeypatch
):
    records, outputs = shapes_predictions
    name = "shapes_val" if with_json else shapes_without_json
    registered = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    ours, theirs = (
        evaluate(choice, name, records, outputs, tmp_path)
        for choice in ("panoptic_fpn_ext", "detectron2")
    )
    assert (set(DatasetCatalog.list()), set(MetadataCatalog.list())) == registered
    common = ours.keys() & theirs.keys()
    assert {"sem_seg/mIoU", "bbox/AP", "segm/APs", "segm/AP-disc"} <= common
    assert {key: ours[key] for key in common} == pytest.approx(
        {key: theirs[key] for key in common}, rel=0, abs=1e-9, nan_ok=True
    )


def test_semantic_pngs_of_a_dataset_are_used_where_it_has_them(tmp_path):
    name = "detectron2_evaluators_test"
    DatasetCatalog.register(name, lambda: [{"file_name": "a", "sem_seg_file_name": "b"}])
    MetadataCatalog.get(name).set(stuff_classes=["sky"], ignore_label=255)
    try:
        evaluator = DETECTRON2_EVALUATOR_REGISTRY.get("sem_seg")(name, str(tmp_path))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert type(evaluator) is SemSegEvaluator
    assert evaluator.input_file_to_gt_file == {"a": "b"}
