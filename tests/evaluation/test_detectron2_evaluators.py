"""Our evaluators against Detectron2's own, on the same dataset and outputs."""

import contextlib
import copy
import io
import json
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.evaluation import DETECTRON2_EVALUATOR_REGISTRY, build_evaluator

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OUTPUTS = ["sem_seg", "instances"] + (["panoptic_seg"] if find_spec("panopticapi") else [])


def evaluate(choice: str, dataset_name: str, records, outputs, folder) -> dict[str, float]:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.TEST.EVALUATORS = "PanopticFPNExt", choice
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = OUTPUTS
    return scores(build_evaluator(cfg, dataset_name, str(folder)), records, outputs)


def scores(evaluator: DatasetEvaluator, records, outputs) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="ignore"):
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            # A model's outputs, which Detectron2's evaluators change, are new for each image.
            evaluator.process([record], [copy.deepcopy(output)])
        results = evaluator.evaluate()
    return {f"{task}/{key}": value for task in results for key, value in results[task].items()}


@pytest.mark.parametrize("with_json", [True, False])
def test_both_give_the_same_scores(shapes_predictions, shapes_without_json, tmp_path, with_json):
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


@pytest.mark.parametrize("with_json", [True, False])
def test_what_train_net_of_detectron2_builds(
    shapes_predictions, shapes_without_json, tmp_path, with_json
):
    """Its ``build_evaluator`` picks them by ``evaluator_type``, and gives them only a name."""
    records, outputs = shapes_predictions
    name = "shapes_val" if with_json else shapes_without_json
    assert MetadataCatalog.get(name).evaluator_type == "coco_panoptic_seg"
    evaluators = [SemSegEvaluator(name, distributed=True, output_dir=str(tmp_path))]
    evaluators.append(COCOEvaluator(name, output_dir=str(tmp_path)))
    if "panoptic_seg" in OUTPUTS:
        evaluators.append(COCOPanopticEvaluator(name, str(tmp_path)))
    theirs = scores(DatasetEvaluators(evaluators), records, outputs)
    ours = evaluate("panoptic_fpn_ext", name, records, outputs, tmp_path)
    common = ours.keys() & theirs.keys()
    assert {"sem_seg/mIoU", "bbox/AP", "segm/APs"} <= common
    # Detectron2's "fast" COCOEvaluator, where it has one, is not exact.
    assert {key: ours[key] for key in common} == pytest.approx(
        {key: theirs[key] for key in common}, rel=0, abs=1e-2, nan_ok=True
    )


def test_instances_are_those_of_the_json(shapes, shapes_without_json):
    """Of Shapes, whose instances JSON was written when the scenes were drawn."""
    assert "json_file" not in MetadataCatalog.get(shapes_without_json).as_dict()
    with PathManager.open(MetadataCatalog.get(shapes_without_json).json_file) as file:
        found = json.load(file)
    expected = json.loads((shapes / "annotations" / "instances_val.json").read_text())

    def key(annotation):
        return annotation["image_id"], annotation["category_id"], annotation["iscrowd"]

    assert Counter(map(key, found["annotations"])) == Counter(map(key, expected["annotations"]))
    assert {c["id"]: c["name"] for c in found["categories"]} == {
        c["id"]: c["name"] for c in expected["categories"]
    }
    assert {i["id"] for i in found["images"]} == {i["id"] for i in expected["images"]}


@pytest.mark.parametrize(
    ("evaluator", "lacking"), [("sem_seg", "sem_seg_file_name"), ("instances", "json_file")]
)
def test_a_dataset_that_lacks_what_detectron2_wants(tmp_path, evaluator, lacking):
    name = "detectron2_evaluators_test"
    DatasetCatalog.register(name, lambda: [{"file_name": "a", "pan_seg_file_name": "b"}])
    MetadataCatalog.get(name).set(stuff_classes=["sky"], ignore_label=255)
    try:
        with pytest.raises(UserError, match=f"{name}' has no {lacking}, .* panoptic_fpn_ext"):
            DETECTRON2_EVALUATOR_REGISTRY.get(evaluator)(name, str(tmp_path))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
