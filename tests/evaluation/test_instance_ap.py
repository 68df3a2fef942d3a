"""Box and mask AP against pycocotools."""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from panoptic_fpn_ext.data.panoptic_png import write_panoptic_png
from panoptic_fpn_ext.errors import UserError
from panoptic_fpn_ext.evaluation.instance_ap import METRICS, InstanceAPEvaluator

from .conftest import in_parts

CLASSES = ["cat", "dog", "cow"]
CATEGORY_IDS = {7: 0, 90: 1, 21: 2}  # in the JSON file, in no order
SIZE = 40, 50


def random_mask(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    top, left = rng.integers(0, SIZE[0] - 3), rng.integers(0, SIZE[1] - 3)
    mask[top : top + rng.integers(2, 36), left : left + rng.integers(2, 36)] = True
    return mask & (rng.random(SIZE) < 0.9) | (np.indices(SIZE) == [[[top]], [[left]]]).all(axis=0)


def encode(mask: np.ndarray) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {**rle, "counts": rle["counts"].decode()}


def predict(rng: np.random.Generator, masks: list[np.ndarray]) -> Instances:
    """Some of the masks, up to twice, with errors, and masks of nothing."""
    predicted = [mask for mask in masks for _ in range(rng.integers(0, 3))]
    predicted += [random_mask(rng) for _ in range(rng.integers(0, 3))]
    boxes = np.array([mask_util.toBbox(encode(mask)) for mask in predicted]).reshape(-1, 4)
    predicted = [mask ^ (rng.random(SIZE) < 0.02) for mask in predicted]
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances(SIZE)
    instances.pred_masks = torch.from_numpy(np.array(predicted, bool).reshape(-1, *SIZE))
    instances.pred_boxes = Boxes(torch.from_numpy(boxes + rng.random(boxes.shape)).float())
    instances.scores = torch.from_numpy(rng.choice([0.1, 0.3, 0.5, 0.9], len(predicted))).float()
    instances.pred_classes = torch.from_numpy(rng.integers(0, len(CLASSES), len(predicted)))
    return instances


def in_json(rng: np.random.Generator, folder: Path, num_images: int):
    """Images whose truth, polygons and RLE, crowds among them, is in a JSON file."""
    records, outputs, annotations = [], [], []
    for image_id in rng.permutation(num_images).tolist():
        masks = [random_mask(rng) for _ in range(rng.integers(0, 5))]
        for mask in masks:
            x, y, w, h = mask_util.toBbox(encode(mask)).tolist()
            segmentation = encode(mask)
            if iscrowd := int(rng.random() < 0.2):
                pass
            elif rng.random() < 0.4:
                segmentation = [[x, y, x + w, y, x + w, y + h + 0.3, x + 1.7, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(list(CATEGORY_IDS))),
                    "iscrowd": iscrowd,
                    "bbox": [x, y, w, h],
                    "area": float(mask.sum() * rng.choice([1, 40])),
                    "segmentation": segmentation,
                }
            )
        records.append(record_of(image_id))
        outputs.append({"instances": predict(rng, masks)})
    content = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": CLASSES[k]} for i, k in CATEGORY_IDS.items()],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    arguments = {"json_file": str(path), "dataset_id_to_contiguous_id": CATEGORY_IDS}
    truth = {
        **content,
        "annotations": [{**a, "category_id": CATEGORY_IDS[a["category_id"]]} for a in annotations],
    }
    return records, outputs, arguments, truth


def in_pngs(rng: np.random.Generator, folder: Path, num_images: int):
    """Images whose truth, crowds and stuff among them, is in panoptic PNGs."""
    records, outputs, annotations = [], [], []
    for image_id in rng.permutation(num_images).tolist():
        ids = np.zeros(SIZE, int)
        for k in range(rng.integers(1, 6)):
            ids[random_mask(rng)] = 1000 * (k + 1)
        masks = [ids == i for i in np.unique(ids[ids > 0])]
        segments = [
            {
                "id": int(ids[mask][0]),
                "category_id": int(rng.integers(len(CLASSES))),
                "isthing": bool(rng.random() < 0.8),
                "iscrowd": int(rng.random() < 0.2),
            }
            for mask in masks
        ]
        for mask, segment in zip(masks, segments, strict=True):
            if segment["isthing"]:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": segment["category_id"],
                        "iscrowd": segment["iscrowd"],
                        "bbox": mask_util.toBbox(encode(mask)).tolist(),
                        "area": int(mask.sum()),
                        "segmentation": encode(mask),
                    }
                )
        record = record_of(image_id)
        record |= {"pan_seg_file_name": str(folder / f"{image_id}.png"), "segments_info": segments}
        write_panoptic_png(record["pan_seg_file_name"], ids)
        records.append(record)
        outputs.append({"instances": predict(rng, masks)})
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(num_images)]
    return records, outputs, {}, {"images": images, "annotations": annotations}


def record_of(image_id) -> dict:
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "height": SIZE[0],
        "width": SIZE[1],
    }


def evaluate(records, outputs, **arguments) -> dict[str, dict[str, float]]:
    evaluator = InstanceAPEvaluator(thing_classes=CLASSES, **arguments)
    evaluator.reset()
    evaluator.process(records, outputs)
    return evaluator.evaluate()


def reference(records, outputs, truth: dict, task: str) -> dict[str, float]:
    """The same from pycocotools, through what Detectron2 gives it."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {**truth, "categories": [{"id": k} for k in range(len(CLASSES))]}
        gt.createIndex()
        detections = [
            detection
            for record, output in zip(records, outputs, strict=True)
            for detection in instances_to_coco_json(output["instances"], record["image_id"])
        ]
        if not detections:
            return dict.fromkeys([*METRICS, *(f"AP-{name}" for name in CLASSES)], math.nan)
        if task == "segm":
            for detection in detections:
                detection.pop("bbox")
        evaluation = COCOeval(gt, gt.loadRes(detections), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result = dict(zip(METRICS, evaluation.stats, strict=False))
    for k, name in enumerate(CLASSES):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        precision = precision[precision > -1]
        result[f"AP-{name}"] = precision.mean() if precision.size else -1
    return {key: 100 * value if value >= 0 else math.nan for key, value in result.items()}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("make", [in_json, in_pngs])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), num_images=st.integers(1, 4))
def test_equals_pycocotools(make, seed, num_images):
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(seed)
        records, outputs, arguments, truth = make(rng, Path(folder), num_images)
        results = evaluate(records, outputs, **arguments)
    assert list(results) == ["bbox", "segm"]
    for task, result in results.items():
        expected = reference(records, outputs, truth, task)
        assert result == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_equals_detectron2_on_shapes(shapes_predictions, tmp_path):
    records, outputs = shapes_predictions
    ours = InstanceAPEvaluator.from_dataset("shapes_val")
    theirs = COCOEvaluator("shapes_val", output_dir=str(tmp_path), use_fast_impl=False)
    theirs.reset()
    for evaluator in (ours, theirs):
        evaluator.process(records, outputs)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = theirs.evaluate()
    results = ours.evaluate()
    assert 0 < results["segm"]["AP"] < 100
    assert list(results) == list(expected)
    for task in expected:
        assert list(results[task]) == list(expected[task])
        assert results[task] == pytest.approx(expected[task], rel=0, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("make", [in_json, in_pngs])
def test_processes_order_and_repeats_change_nothing(make, tmp_path, evaluate_in_processes):
    records, outputs, arguments, _ = make(np.random.default_rng(1), tmp_path, 7)
    expected = evaluate(records, outputs, **arguments)
    assert len(set(expected["bbox"].values()) | set(expected["segm"].values())) > 6
    for num_parts in (1, 2, 3, 7):
        parts = in_parts(np.random.default_rng(num_parts), num_parts, records, outputs)
        results = evaluate_in_processes(
            lambda: InstanceAPEvaluator(thing_classes=CLASSES, **arguments), parts
        )
        assert repr(results) == repr(expected)  # to the last digit, nan included


def test_only_images_that_were_processed_are_evaluated(tmp_path):
    records, outputs, arguments, truth = in_json(np.random.default_rng(2), tmp_path, 4)
    results = evaluate(records[:2], outputs[:2], **arguments)
    ids = [record["image_id"] for record in records[:2]]
    truth = {key: [x for x in truth[key] if x.get("image_id", x["id"]) in ids] for key in truth}
    for task, scores in results.items():
        expected = reference(records[:2], outputs[:2], truth, task)
        assert scores == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_the_truth_is_in_the_json_where_a_dataset_has_one(shapes_without_json):
    for name, expected in (("shapes_val", "instances_val.json"), (shapes_without_json, "None")):
        arguments = InstanceAPEvaluator.dataset_arguments(MetadataCatalog.get(name))
        assert Path(str(arguments["json_file"])).name == expected


def test_image_ids_may_be_strings(tmp_path):
    records, outputs, _, _ = in_pngs(np.random.default_rng(2), tmp_path, 4)
    expected = evaluate(records, outputs)
    renamed = [{**record, "image_id": f"frankfurt_{record['image_id']}"} for record in records]
    results = evaluate(renamed, outputs)
    for task in expected:
        assert results[task] == pytest.approx(expected[task], nan_ok=True)


def without_predictions(outputs: list[dict]) -> list[dict]:
    return [{"instances": output["instances"][:0]} for output in outputs]


def test_nothing_predicted_is_nan_as_in_detectron2(tmp_path, caplog):
    records, outputs, arguments, _ = in_json(np.random.default_rng(3), tmp_path, 2)
    results = evaluate(records, without_predictions(outputs), **arguments)
    assert list(results) == ["bbox", "segm"]
    assert all(math.isnan(value) for result in results.values() for value in result.values())
    assert "No instances were predicted" in caplog.text


def test_one_image_without_predictions_or_truth(tmp_path):
    rng = np.random.default_rng(4)
    records, outputs, _, truth = in_pngs(rng, tmp_path, 3)
    outputs[0] = without_predictions(outputs)[0]
    outputs[0]["instances"].remove("pred_masks")
    empty = np.zeros(SIZE, int)
    empty[3] = 5
    write_panoptic_png(records[1]["pan_seg_file_name"], empty)
    records[1]["segments_info"] = [{"id": 5, "category_id": 1, "isthing": False, "iscrowd": 0}]
    gone = records[1]["image_id"]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] != gone]
    expected = reference(records, outputs, truth, "segm")
    assert evaluate(records, outputs)["segm"] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_no_truth_is_nan(tmp_path):
    records, outputs, _, _ = in_pngs(np.random.default_rng(5), tmp_path, 2)
    for record in records:
        write_panoptic_png(record["pan_seg_file_name"], np.zeros(SIZE, int))
        record["segments_info"] = []
    results = evaluate(records, outputs)
    assert all(math.isnan(value) for result in results.values() for value in result.values())
    assert all(math.isnan(value) for value in evaluate([], [])["bbox"].values())


def test_without_masks_there_is_box_ap_only(tmp_path):
    records, outputs, _, truth = in_pngs(np.random.default_rng(6), tmp_path, 2)
    expected = reference(records, outputs, truth, "bbox")
    for output in outputs:
        output["instances"].remove("pred_masks")
    results = evaluate(records, outputs)
    assert list(results) == ["bbox"]
    assert results["bbox"] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_dataset_without_things_has_no_ap():
    evaluator = InstanceAPEvaluator(thing_classes=[])
    instances = Instances(SIZE, pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    record = {**record_of(1), "segments_info": [], "pan_seg_file_name": "absent.png"}
    evaluator.process([], [])
    assert evaluator.evaluate() == {}
    with pytest.raises(UserError, match=r"absent\.png"):
        evaluator.process([record], [{"instances": instances}])


def test_mistakes_are_named(tmp_path):
    records, outputs, arguments, _ = in_json(np.random.default_rng(8), tmp_path, 2)
    with pytest.raises(UserError, match=r"\.jpg has no instances, only \['sem_seg'\]"):
        evaluate(records[:1], [{"sem_seg": 0}], **arguments)
    with pytest.raises(UserError, match=r"\.jpg is 40 x 50 pixels .* its image is 41 x 50"):
        evaluate([{**records[0], "height": 41}], outputs[:1], **arguments)
    for category in (3, -1):
        wrong = Instances(
            SIZE,
            pred_boxes=Boxes(torch.zeros(1, 4)),
            scores=torch.zeros(1),
            pred_classes=torch.tensor([category]),
        )
        message = rf"pred_classes {category}\.\.{category}, but the dataset has 3 thing"
        with pytest.raises(UserError, match=message):
            evaluate(records[:1], [{"instances": wrong}], **arguments)


def test_a_segment_that_others_cover_is_no_truth(tmp_path):
    records, outputs, _, _ = in_pngs(np.random.default_rng(8), tmp_path, 3)
    expected = evaluate(records, outputs)
    records[0]["segments_info"].append({"id": 77, "category_id": 0, "isthing": True})
    np.testing.assert_equal(evaluate(records, outputs), expected)


def rewritten(arguments, change):
    path = Path(arguments["json_file"])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_areas_that_are_not_given_are_the_masks(tmp_path):
    records, outputs, arguments, _ = in_json(np.random.default_rng(9), tmp_path, 8)

    def measure(content):
        for annotation in content["annotations"]:
            mask = annotation["segmentation"]
            if isinstance(mask, list):
                mask = mask_util.merge(mask_util.frPyObjects(mask, *SIZE))
            annotation["area"] = int(mask_util.decode(mask).sum())

    rewritten(arguments, measure)
    expected = evaluate(records, outputs, **arguments)
    rewritten(arguments, lambda content: [a.pop("area") for a in content["annotations"]])
    np.testing.assert_equal(evaluate(records, outputs, **arguments), expected)


def test_categories_need_no_names(tmp_path):
    records, outputs, arguments, _ = in_json(np.random.default_rng(9), tmp_path, 3)
    expected = evaluate(records, outputs, **arguments)
    rewritten(arguments, lambda content: [c.pop("name") for c in content["categories"]])
    np.testing.assert_equal(evaluate(records, outputs, **arguments), expected)


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [5, 5, 9, 9, 2]])
def test_what_training_leaves_out_is_no_truth(polygon, tmp_path):
    """A polygon of fewer than three points, or half a point."""
    records, outputs, arguments, _ = in_json(np.random.default_rng(9), tmp_path, 8)
    expected = evaluate(records, outputs, **arguments)

    def add(content):
        annotation = next(a for a in content["annotations"] if not a["iscrowd"])
        content["annotations"].append({**annotation, "id": 1000, "segmentation": [polygon]})

    rewritten(arguments, add)
    np.testing.assert_equal(evaluate(records, outputs, **arguments), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("annotations"), r"instances\.json: no field 'annotations'"),
        (
            lambda content: content["annotations"][0].update(
                segmentation={"size": [*SIZE], "counts": [200]}
            ),
            r"annotations\[0\]: segmentation has counts whose sum is 200, expected 2000, H x W",
        ),
        (
            lambda content: content["categories"][0].update(name="horse"),
            r"category \d+ is 'horse', but in the panoptic JSON it is '(cat|dog|cow)'",
        ),
        (lambda content: content["annotations"][0].update(category_id=5), "category_id 5"),
        (lambda content: content["annotations"][1].pop("segmentation"), "no mask in segmentation"),
    ],
)
def test_faults_in_the_json_are_named(tmp_path, change, message):
    records, outputs, arguments, _ = in_json(np.random.default_rng(9), tmp_path, 3)
    path = Path(arguments["json_file"])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        evaluate(records, outputs, **arguments)
    path.unlink()
    with pytest.raises(UserError, match=r"instances\.json"):
        evaluate(records, outputs, **arguments)


def results_file(folder: Path) -> list[dict]:
    """The results in a folder that has nothing else of ours."""
    assert {path.name for path in folder.iterdir()} <= {
        "coco_instances_results.json",
        "instances_predictions.pth",  # Detectron2's
    }
    return json.loads((folder / "coco_instances_results.json").read_text())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_the_file_of_predictions_is_detectron2s(
    shapes_predictions, shapes_without_json, tmp_path, with_json, masks
):
    records, outputs = shapes_predictions
    outputs[0] = without_predictions(outputs)[0]
    if not masks:
        [output["instances"].remove("pred_masks") for output in outputs]
    name = "shapes_val" if with_json else shapes_without_json
    ours = InstanceAPEvaluator.from_dataset(name, tmp_path / "a" / "ours")
    theirs = COCOEvaluator(name, output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
    for evaluator in (ours, theirs):
        evaluator.reset()
        evaluator.process(records, outputs)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.evaluate()
    found, expected = results_file(tmp_path / "a" / "ours"), results_file(tmp_path / "theirs")
    assert len(expected) > 10
    assert found == expected  # to the last digit; the records are in the order of their ids
    assert [list(result) for result in found] == [list(result) for result in expected]


def test_processes_write_one_file(shapes_predictions, tmp_path, evaluate_in_processes):
    records, outputs = shapes_predictions
    parts = [(records[3:], outputs[3:]), (records[:4], outputs[:4])]
    files = []
    for folder, share in ((tmp_path / "1", [(records, outputs)]), (tmp_path / "2", parts)):
        for _ in range(2):  # the second replaces the first
            evaluate_in_processes(
                lambda folder=folder: InstanceAPEvaluator.from_dataset("shapes_val", folder), share
            )
        files.append((folder / "coco_instances_results.json").read_bytes())
    assert files[0] == files[1]
    assert len(json.loads(files[0])) == sum(len(output["instances"]) for output in outputs)


def test_a_file_is_replaced_by_a_whole_one_alone(tmp_path):
    records, outputs, _, _ = in_pngs(np.random.default_rng(2), tmp_path, 3)
    path = tmp_path / "results.json"
    evaluate(records, outputs, results_file=path)
    before = path.read_bytes()
    assert json.loads(before)
    unwritable = [{**record, "image_id": complex(k)} for k, record in enumerate(records[:1])]
    with pytest.raises(TypeError, match="complex"):
        evaluate(unwritable, outputs[:1], results_file=path)
    assert path.read_bytes() == before


def test_a_file_without_predictions(tmp_path):
    records, outputs, _, _ = in_pngs(np.random.default_rng(3), tmp_path, 2)
    path = tmp_path / "results.json"
    evaluate(records, without_predictions(outputs), results_file=path)
    assert json.loads(path.read_text()) == []


def test_ids_of_any_kind_are_written(tmp_path):
    records, outputs, _, _ = in_pngs(np.random.default_rng(2), tmp_path, 4)
    renamed = [{**record, "image_id": f'aachen "{record["image_id"]}"'} for record in records]
    evaluate(renamed, outputs, results_file=tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} <= {r["image_id"] for r in renamed}
    assert {result["category_id"] for result in results} == {0, 1, 2}  # no others are known


def test_a_class_that_is_no_thing_category_is_not_written(tmp_path):
    """As stuff in the full label spaces of Detectron2."""
    records, outputs, _, _ = in_pngs(np.random.default_rng(2), tmp_path, 4)
    path = tmp_path / "results.json"
    evaluate(records, outputs, dataset_id_to_contiguous_id={7: 0, 9: 2}, results_file=path)
    classes = torch.cat([output["instances"].pred_classes for output in outputs])
    written = [result["category_id"] for result in json.loads(path.read_text())]
    assert [written.count(k) for k in (7, 9)] == [int((classes == k).sum()) for k in (0, 2)]
    assert len(written) == int((classes != 1).sum()) < len(classes)
