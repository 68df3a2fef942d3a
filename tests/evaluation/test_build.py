"""Which evaluators a dataset gets, and where their scores go."""

import json
import zipfile

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.data.panoptic_png import write_panoptic_png
from panoptic_fpn_ext.evaluation import (
    EVALUATOR_REGISTRY,
    build_evaluator,
    evaluator_builders,
    needs,
)

DATASET = "evaluation_build_test"

INTERVALS = [f"panoptic_seg/PQ{kind}" for kind in ("", "_th", "_st")]
INTERVALS += ["sem_seg/mIoU", "bbox/AP", "segm/AP"]


def config(**keys) -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPNExt"
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


def test_a_submission_is_written_before_evaluators_change_predictions(
    shapes_predictions, tmp_path, monkeypatch
):
    class Spoiler(DatasetEvaluator):
        def process(self, inputs, outputs) -> None:
            for output in outputs:
                output["panoptic_seg"][1].clear()

        def evaluate(self) -> None:
            return None

    spoiler = needs("panoptic_seg")(lambda dataset_name, output_folder: Spoiler())
    monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, "spoiler", spoiler)
    monkeypatch.setitem(MetadataCatalog.get("shapes_val").__dict__, "evaluators", ("spoiler",))
    records, outputs = shapes_predictions
    expected = [len(output["panoptic_seg"][1]) for output in outputs]
    evaluator = build_evaluator(config(TEST__SUBMISSION=True), "shapes_val", str(tmp_path))
    evaluator.reset()
    evaluator.process(records, outputs)
    assert evaluator.evaluate() == {}
    with zipfile.ZipFile(tmp_path / "shapes_val_submission.zip") as file:
        (name,) = (name for name in file.namelist() if name.endswith(".json"))
        annotations = json.loads(file.read(name))["annotations"]
    assert [len(annotation["segments_info"]) for annotation in annotations] == expected


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


@pytest.mark.parametrize("name", ["cityscapes_sem_seg", "cityscapes_instances"])
def test_an_older_numpy_is_asked_for(metadata, monkeypatch, name):
    metadata.evaluators = (name,)
    cfg = config(TEST__EVALUATORS="detectron2")
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    assert names(cfg) == [name]
    monkeypatch.delattr(np, "in1d")  # as in NumPy 2.4
    with pytest.raises(UserError, match=rf"{name} needs numpy\.in1d, .*: pip install 'numpy<2.4'"):
        evaluator_builders(cfg, DATASET)
    cfg.TEST.EVALUATORS = "panoptic_fpn_ext"
    assert names(cfg) == [name]


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


@pytest.mark.parametrize(
    ("name", "sky", "car", "sem_seg_of_car"),
    [
        ("cityscapes_fine_panoptic_val", 10, 13, "IoU-car"),
        ("coco_2017_val_100_panoptic", 119, 2, "IoU-car"),
        ("coco_2017_val_panoptic_separated", 40, 2, "IoU-things"),
    ],
)
def test_the_panoptic_datasets_of_detectron2_are_evaluated(
    name, sky, car, sem_seg_of_car, tmp_path, monkeypatch
):
    metadata = MetadataCatalog.get(name)
    if "json_file" in metadata.as_dict():
        monkeypatch.delitem(metadata.__dict__, "json_file")  # which is not here
    assert metadata.stuff_classes[sky].startswith("sky")
    assert metadata.thing_classes[car] == "car"
    ids = np.repeat([[1], [2]], 4, axis=0).repeat(8, axis=1)
    write_panoptic_png(tmp_path / "a.png", ids)
    segments = [
        {"id": 1, "category_id": sky, "isthing": False, "iscrowd": 0},
        {"id": 2, "category_id": car, "isthing": True, "iscrowd": 0},
    ]
    record = {"file_name": "a.jpg", "image_id": 1, "height": 8, "width": 8}
    record |= {"pan_seg_file_name": str(tmp_path / "a.png"), "segments_info": segments}
    instances = Instances(
        ids.shape,
        pred_boxes=Boxes(torch.tensor([[0.0, 4.0, 8.0, 8.0]])),
        scores=torch.ones(1),
        pred_classes=torch.tensor([car]),
        pred_masks=torch.from_numpy(ids == 2)[None],
    )
    classes = metadata.stuff_classes
    sem_seg = torch.zeros(len(classes), *ids.shape)
    sem_seg[sky][ids == 1] = sem_seg[classes.index(sem_seg_of_car[4:])][ids == 2] = 1
    output = {
        "panoptic_seg": (torch.from_numpy(ids), segments),
        "sem_seg": sem_seg,
        "instances": instances,
    }
    evaluator = build_evaluator(config(), name, str(tmp_path))
    evaluator.reset()
    evaluator.process([record], [output])
    scores = evaluator.evaluate()
    panoptic, semantic = scores["panoptic_seg"], scores["sem_seg"]
    assert panoptic["PQ_th"] == panoptic["PQ_st"] == panoptic["PQ-car"] == 100
    assert panoptic[f"PQ-{classes[sky]}"] == 100
    assert semantic["mIoU"] == semantic[sem_seg_of_car] == 100
    assert scores["bbox"]["AP-car"] == scores["segm"]["AP-car"] == pytest.approx(100)


def test_evaluators_find_the_scores_that_they_say(trained):
    """Of a trained network, all that do not follow from its classes, and no others."""
    found = set(json.loads((trained / "inference" / "metrics.json").read_text()))
    said = {score for build in evaluator_builders(config(), "shapes_val") for score in build.scores}
    each = tuple(score for score in said if score.endswith("-"))
    assert {score for score in found if not score.startswith(each)} == said - {*each}
    assert all(any(score.startswith(one) for score in found) for one in each)


def test_intervals_and_boundary_by_key(shapes_predictions, tmp_path):
    records, outputs = shapes_predictions
    scores = {}
    for on in (False, True):
        cfg = config(TEST__INTERVALS=on, TEST__BOUNDARY_PQ=on)
        evaluator = build_evaluator(cfg, "shapes_val", str(tmp_path))
        evaluator.reset()
        evaluator.process(records, outputs)
        scores[on] = evaluator.evaluate()
        assert not evaluator.failures
    for task, metrics in scores[False].items():
        assert metrics.items() <= scores[True][task].items()
    extra = {
        f"{task}/{key}": value
        for task, metrics in scores[True].items()
        for key, value in metrics.items()
        if key not in scores[False][task]
    }
    ends = {f"{key}_{end}" for key in INTERVALS for end in ("low", "high")}
    assert extra.keys() == ends | {f"panoptic_seg/boundary_PQ{k}" for k in ("", "_th", "_st")}
    for key in INTERVALS:
        task, metric = key.split("/")
        assert extra[f"{key}_low"] < scores[True][task][metric] < extra[f"{key}_high"]
