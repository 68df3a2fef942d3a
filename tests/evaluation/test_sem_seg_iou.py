"""Semantic metrics against Detectron2's SemSegEvaluator and cityscapesscripts."""

import logging
import math
import tempfile
import uuid
from pathlib import Path

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as cityscapes
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import trainId2label
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from panoptic_fpn_ext.data.panoptic_png import write_panoptic_png
from panoptic_fpn_ext.errors import UserError
from panoptic_fpn_ext.evaluation.sem_seg_iou import SemSegIoUEvaluator

from .conftest import in_parts

CLASSES = ["things", "sky", "sea", "sand"]
DATASET = {"stuff_classes": CLASSES, "thing_sem_seg_ids": (0, 0)}


def logits_of(pred: np.ndarray, num_classes: int = len(CLASSES)) -> torch.Tensor:
    """Logits (C, H, W) whose maximum is at ``pred``."""
    logits = torch.rand(num_classes, *pred.shape)
    return logits.scatter_(0, torch.from_numpy(pred)[None].long(), 2.0)


def write_labels(file_name: Path, labels: np.ndarray) -> dict:
    """Write an 8-bit grey PNG of labels; returns its dataset dict."""
    Image.fromarray(labels.astype(np.uint8)).save(file_name)
    return {"file_name": file_name.stem + ".jpg", "sem_seg_file_name": str(file_name)}


def evaluate(records: list[dict], logits: list[torch.Tensor], **kwargs) -> dict[str, float]:
    evaluator = SemSegIoUEvaluator(**{**DATASET, **kwargs})
    evaluator.reset()
    evaluator.process(records, [{"sem_seg": x} for x in logits])
    return evaluator.evaluate()["sem_seg"]


def detectron2_results(records: list[dict], logits: list[torch.Tensor]) -> dict[str, float]:
    name = f"sem_seg_iou_test_{uuid.uuid4()}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=CLASSES, ignore_label=255)
    try:
        evaluator = SemSegEvaluator(name, distributed=False)
        evaluator.reset()
        evaluator.process(records, [{"sem_seg": x} for x in logits])
        with np.errstate(invalid="ignore"):
            return evaluator.evaluate()["sem_seg"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@st.composite
def label_maps(draw) -> tuple[np.ndarray, np.ndarray]:
    """Truth with ignored pixels, and a prediction."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    classes = st.integers(0, len(CLASSES) - 1)
    gt = draw(hnp.arrays(np.int64, shape, elements=st.one_of(classes, st.just(255))))
    pred = draw(hnp.arrays(np.int64, shape, elements=classes))
    return gt, np.where(draw(hnp.arrays(bool, shape)) & (gt != 255), gt, pred)


def mean_iou(results: dict[str, float]) -> float:
    """mIoU without the classes that are nowhere true, as Detectron2's main branch has it."""
    ious = [results[f"IoU-{name}"] for name in CLASSES]
    return math.nan if all(map(math.isnan, ious)) else float(np.nanmean(ious))


@pytest.fixture(scope="module")
def miou_of_detectron2(tmp_path_factory):
    """What the installed Detectron2 has for ``mIoU``, in terms of our results."""
    record = write_labels(tmp_path_factory.mktemp("labels") / "a.png", np.zeros((1, 2)))
    found = detectron2_results([record], [logits_of(np.array([[0, 1]]))])["mIoU"]
    return {25: lambda results: results["mIoU"], 50: mean_iou}[found]


@settings(max_examples=60, deadline=None)
@given(cases=st.lists(label_maps(), min_size=1, max_size=3))
def test_equals_detectron2(miou_of_detectron2, cases):
    logits = [logits_of(pred) for _, pred in cases]
    with tempfile.TemporaryDirectory() as folder:
        records = [write_labels(Path(folder) / f"{i}.png", gt) for i, (gt, _) in enumerate(cases)]
        results = evaluate(records, logits)
        expected = detectron2_results(records, logits)
    keys = [key for key in expected if key in results]  # later versions have more
    assert list(results) == keys
    if all((gt == 255).all() for gt, _ in cases):
        assert all(math.isnan(value) for value in results.values())
        return
    assert {**results, "mIoU": miou_of_detectron2(results)} == pytest.approx(
        {key: expected[key] for key in keys}, rel=0, abs=1e-10, nan_ok=True
    )


def test_a_class_that_is_predicted_and_nowhere_true_counts_as_zero_in_miou(tmp_path):
    gt = np.repeat([[0, 1, 255]], 100, axis=1)
    pred = gt.copy()
    pred[0, [*range(5), *range(100, 105)]] = 2
    pred[gt == 255] = 3  # where it is not evaluated
    records = [write_labels(tmp_path / "a.png", gt)]
    results = evaluate(records, [logits_of(pred)])
    assert results["mIoU"] == pytest.approx((95 + 95 + 0) / 3)
    assert results["mACC"] == results["pACC"] == results["fwIoU"] == pytest.approx(95)
    assert math.isnan(results["IoU-sea"])
    assert math.isnan(results["IoU-sand"])
    # The other convention is the mean of what is not nan.
    assert mean_iou(results) == pytest.approx(95)
    found = detectron2_results(records, [logits_of(pred)])["mIoU"]
    assert found in (pytest.approx(190 / 3), pytest.approx(95))


@pytest.mark.parametrize("seed", range(3))
def test_equals_cityscapesscripts(tmp_path, seed):
    rng = np.random.default_rng(seed)
    # Some classes are predicted and nowhere true.
    gt = np.kron(rng.choice([*range(12), 255], (6, 8)), np.ones((5, 4), int))
    pred = np.where((rng.random(gt.shape) < 0.6) & (gt != 255), gt, rng.integers(0, 19, gt.shape))

    to_id = np.zeros(256, np.uint8)  # id 0 is "unlabeled", which is not evaluated
    to_id[:19] = [trainId2label[i].id for i in range(19)]
    Image.fromarray(to_id[gt]).save(tmp_path / "a_gtFine_labelIds.png")
    Image.fromarray(to_id[pred]).save(tmp_path / "a_pred.png")
    args = cityscapes.CArgs()
    args.evalInstLevelScore = args.evalPixelAccuracy = False
    args.avgClassSize = {}
    confusion = cityscapes.generateMatrix(args)
    cityscapes.evaluatePair(
        str(tmp_path / "a_pred.png"),
        str(tmp_path / "a_gtFine_labelIds.png"),
        confusion, {}, {}, args,
    )  # fmt: skip
    scores = {
        trainId2label[i].name: cityscapes.getIouScoreForLabel(trainId2label[i].id, confusion, args)
        for i in range(19)
    }

    names = list(scores)
    results = evaluate(
        [write_labels(tmp_path / "a.png", gt)],
        [logits_of(pred, 19)],
        stuff_classes=names,
        thing_sem_seg_ids=range(11, 19),
    )
    assert results["mIoU"] == pytest.approx(100 * cityscapes.getScoreAverage(scores, args))
    for i, name in enumerate(names):
        if (gt == i).any():
            assert results[f"IoU-{name}"] == pytest.approx(100 * scores[name])


def test_ground_truth_from_panoptic_pngs(tmp_path):
    ids = np.kron(np.array([[0, 70000, 2], [3, 4, 5]]), np.ones((4, 4), int))
    segments = [
        {"id": 70000, "category_id": 1, "isthing": True, "iscrowd": 0},
        {"id": 2, "category_id": 0, "isthing": True, "iscrowd": 1},
        {"id": 3, "category_id": 2, "isthing": False, "iscrowd": 0},
        {"id": 4, "category_id": 3, "isthing": False, "iscrowd": 0},
        {"id": 5, "category_id": 2, "isthing": False, "iscrowd": 0},
    ]
    write_panoptic_png(tmp_path / "pan.png", ids)
    panoptic = {
        "file_name": "a.jpg",
        "pan_seg_file_name": str(tmp_path / "pan.png"),
        "segments_info": segments,
    }
    pred = np.random.default_rng(0).integers(0, 4, ids.shape)
    for thing_sem_seg_ids in ((0, 0), (0, 1)):  # separated, full
        sem_seg_of = {
            0: 255,
            70000: thing_sem_seg_ids[1],
            2: thing_sem_seg_ids[0],
            3: 2,
            4: 3,
            5: 2,
        }
        labels = np.vectorize(sem_seg_of.get)(ids)
        expected = evaluate([write_labels(tmp_path / "l.png", labels)], [logits_of(pred)])
        results = evaluate([panoptic], [logits_of(pred)], thing_sem_seg_ids=thing_sem_seg_ids)
        assert results == pytest.approx(expected, nan_ok=True)
    # The panoptic ground truth goes first where a dataset dict has both.
    both = {**write_labels(tmp_path / "l.png", np.zeros(ids.shape)), **panoptic}
    assert evaluate([both], [logits_of(pred)], thing_sem_seg_ids=(0, 1)) == pytest.approx(
        expected, nan_ok=True
    )


def test_many_classes(tmp_path):
    names = [f"class {i}" for i in range(254)]
    labels = np.arange(254)[None]
    record = write_labels(tmp_path / "a.png", labels)
    results = evaluate([record], [logits_of(labels, 254)], stuff_classes=names)
    assert results["mIoU"] == results["IoU-class 253"] == 100


@pytest.mark.parametrize("kind", [np.uint8, np.int64, torch.int32, np.float32])
def test_classes_of_another_model_are_as_good_as_logits(tmp_path, kind):
    rng = np.random.default_rng(0)
    records = [
        write_labels(tmp_path / f"{k}.png", rng.choice([0, 1, 2, 3, 255], (5, 6))) for k in range(3)
    ]
    classes = [rng.integers(0, 4, (5, 6)) for _ in records]
    expected = evaluate(records, [logits_of(c) for c in classes])
    if kind is np.float32:
        outputs = [logits_of(c).numpy() for c in classes]
    elif isinstance(kind, torch.dtype):
        outputs = [torch.from_numpy(c).to(kind) for c in classes]
    else:
        outputs = [c.astype(kind) for c in classes]
        outputs[0].setflags(write=False)  # as Pillow's are
    assert evaluate(records, outputs) == expected
    assert 0 < expected["mIoU"] < 100


def test_another_ignore_label(tmp_path):
    gt = np.array([[1, 1, 0, 9]])
    record = write_labels(tmp_path / "a.png", gt)
    logits = logits_of(np.array([[1, 1, 1, 1]]))
    assert evaluate([record], [logits], ignore_label=9)["pACC"] == pytest.approx(200 / 3)
    record = write_labels(tmp_path / "b.png", np.where(gt == 9, 1, gt))
    assert evaluate([record], [logits], ignore_label=0)["pACC"] == 100


def test_processes_order_and_repeats_change_nothing(tmp_path, evaluate_in_processes):
    rng = np.random.default_rng(0)
    cases = [rng.integers(0, 4, (2, 11, 13)) for _ in range(5)]
    records = [write_labels(tmp_path / f"{i}.png", gt) for i, (gt, _) in enumerate(cases)]
    logits = [logits_of(pred) for _, pred in cases]
    expected = evaluate(records, logits, distributed=False)
    outputs = [{"sem_seg": x} for x in logits]
    for num_parts in (1, 2, 5):
        parts = in_parts(rng, num_parts, records * 2, outputs * 2)
        results = evaluate_in_processes(lambda: SemSegIoUEvaluator(**DATASET), parts)
        assert results["sem_seg"] == expected


def test_reset_forgets(tmp_path):
    record = write_labels(tmp_path / "a.png", np.array([[1, 1]]))
    evaluator = SemSegIoUEvaluator(**DATASET)
    for pred, expected in (([[2, 2]], 0), ([[1, 1]], 100)):
        evaluator.reset()
        evaluator.process([record], [{"sem_seg": logits_of(np.array(pred))}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == expected


def test_nothing_to_evaluate_is_nan_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        results = evaluate([], [])
    assert all(math.isnan(value) for value in results.values())
    assert "no labelled pixels" in caplog.text


def test_the_log_has_both_tables(tmp_path, caplog):
    record = write_labels(tmp_path / "a.png", np.array([[1, 1]]))
    with caplog.at_level(logging.INFO):
        evaluate([record], [logits_of(np.array([[1, 1]]))])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines()]
    assert ["mIoU", "fwIoU", "mACC", "pACC"] in rows
    assert ["sky", "100.000", "100.000"] in rows


def test_from_dataset(tmp_path):
    name = "sem_seg_iou_test"
    MetadataCatalog.get(name).set(
        stuff_classes=["a", "b"], thing_sem_seg_ids=(1,), ignore_label=7
    )  # fmt: skip
    try:
        evaluator = SemSegIoUEvaluator.from_dataset(name)
    finally:
        MetadataCatalog.remove(name)
    record = write_labels(tmp_path / "a.png", np.array([[0, 1, 7]]))
    evaluator.process([record], [{"sem_seg": logits_of(np.array([[0, 1, 1]]), 2)}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["IoU-a"] == results["IoU-b"] == 100


@pytest.mark.parametrize(
    ("labels", "output", "message"),
    [
        ([[0, 1]], {"sem_seg": torch.zeros(4, 1, 3)}, r"a\.jpg is 1 x 3.*a\.png is 1 x 2"),
        ([[0, 1]], {"sem_seg": torch.zeros(4, 2, 1)}, r"a\.jpg is 2 x 1.*a\.png is 1 x 2"),
        ([[0, 1]], {"sem_seg": torch.zeros(5, 1, 2)}, r"a\.jpg has 5 .* has 4; set MODEL\.SEM_SEG"),
        ([[0, 1]], {"sem_seg": np.array([[0, 4]])}, r"a\.jpg has classes 0\.\.4, but .* has 4$"),
        ([[0, 1]], {"sem_seg": np.array([[-1, 3]])}, r"a\.jpg has classes -1\.\.3, but .* has 4$"),
        ([[0, 1]], {"sem_seg": np.array([[0, 0, 0]])}, r"a\.jpg is 1 x 3.*a\.png is 1 x 2"),
        ([[0, 1]], {"instances": None}, r"a\.jpg has no sem_seg, only \['instances'\]"),
        ([[0, 4]], {"sem_seg": torch.zeros(4, 1, 2)}, r"a\.png: labels \[4\] are neither"),
    ],
)
def test_faults_are_named(tmp_path, labels, output, message):
    record = write_labels(tmp_path / "a.png", np.array(labels))
    with pytest.raises(UserError, match=message):
        SemSegIoUEvaluator(**DATASET).process([record], [output])


def test_faulty_ground_truth_files_are_named(tmp_path):
    Image.new("P", (2, 1)).save(tmp_path / "palette.png")
    (tmp_path / "text.png").write_text("hello")
    whole = write_labels(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 4, (50, 50)))
    content = Path(whole["sem_seg_file_name"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for name, message in {
        "palette": "mode P; expected 8-bit grey",
        "text": "cannot read",
        "cut": "cannot read",
        "missing": "cannot read",
    }.items():
        record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / f"{name}.png")}
        with pytest.raises(UserError, match=rf"{name}\.png: .*{message}"):
            evaluate([record], [torch.zeros(4, 1, 2)])
    with pytest.raises(UserError, match=r"a\.jpg: no semantic ground truth"):
        evaluate([{"file_name": "a.jpg"}], [torch.zeros(4, 1, 2)])
