"""Panoptic quality against cityscapesscripts, which runs panopticapi's algorithm."""

import contextlib
import io
import json
import logging
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation.evalPanopticSemanticLabeling import pq_compute_single_core
from detectron2.data import MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png
from panoptic_fpn_ext.errors import UserError
from panoptic_fpn_ext.evaluation.panoptic_matching import match_segments
from panoptic_fpn_ext.evaluation.panoptic_quality import PanopticQualityEvaluator
from panoptic_fpn_ext.evaluation.sem_seg_iou import SemSegIoUEvaluator

from .conftest import in_parts

THINGS = ["cat", "dog"]
STUFF = ["things", "sky", "sea"]
CATEGORIES = {(True, 0): "cat", (True, 1): "dog", (False, 1): "sky", (False, 2): "sea"}
QUALITIES = ("pq", "sq", "rq")
DATASET = {"thing_classes": THINGS, "stuff_classes": STUFF, "thing_sem_seg_ids": (0, 0)}


@st.composite
def segments_of(draw, labels: np.ndarray, categories: list) -> tuple[np.ndarray, list[dict]]:
    """Random ids, in random order, for a map of labels; 0 is void, k has ``categories[k - 1]``."""
    present = [int(label) for label in np.unique(labels) if label]
    ids = draw(
        st.lists(
            st.integers(1, 2**24 - 1), min_size=len(present), max_size=len(present), unique=True
        )
    )
    table = np.zeros(6, np.int32)
    table[present] = ids
    segments = [
        {"id": i, "category_id": categories[label - 1][1], "isthing": categories[label - 1][0]}
        for i, label in zip(ids, present, strict=True)
    ]
    return table[labels], draw(st.permutations(segments))


@st.composite
def images(draw) -> tuple[np.ndarray, list[dict], np.ndarray, list[dict]]:
    """Truth and prediction of an image; they agree in part, and hold void and crowds."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=7))
    labels = hnp.arrays(np.int64, shape, elements=st.integers(0, 5), fill=st.integers(0, 5))
    true = draw(labels)
    errors = draw(hnp.arrays(bool, shape, elements=st.booleans(), fill=st.just(False)))
    predicted = np.where(errors, draw(labels), true)
    category = st.sampled_from(sorted(CATEGORIES))
    true_categories = [draw(category) for _ in range(5)]
    predicted_categories = [draw(st.just(c) | st.just(c) | category) for c in true_categories]
    gt_ids, gt_segments = draw(segments_of(true, true_categories))
    gt_segments = [{**s, "iscrowd": draw(st.sampled_from([0, 0, 1]))} for s in gt_segments]
    return gt_ids, gt_segments, *draw(segments_of(predicted, predicted_categories))


def write_image(folder: Path, image_id: int | str, gt_ids, gt_segments) -> dict:
    """Write the ground truth of an image; returns its dataset dict."""
    pan_seg_file_name = str(folder / f"{image_id}.png")
    write_panoptic_png(pan_seg_file_name, gt_ids)
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "pan_seg_file_name": pan_seg_file_name,
        "segments_info": gt_segments,
    }


def output_of(pred_ids: np.ndarray, pred_segments: list[dict]) -> dict:
    return {"panoptic_seg": (torch.from_numpy(pred_ids.astype(np.int32)), pred_segments)}


def evaluate(records: list[dict], outputs: list[dict], **kwargs) -> dict[str, float]:
    evaluator = PanopticQualityEvaluator(**DATASET, **kwargs)
    evaluator.reset()
    for record, output in zip(records, outputs, strict=True):
        evaluator.process([record], [output])
    return evaluator.evaluate()["panoptic_seg"]


def reference(records: list[dict], predictions: list[tuple], folder: Path) -> dict[str, float]:
    """The same results from cityscapesscripts; nan for what it has no segments of."""
    category_ids = {category: 10 + i for i, category in enumerate(CATEGORIES)}

    def with_ids(segments: list[dict]) -> list[dict]:
        return [
            {**s, "category_id": category_ids[s["isthing"], s["category_id"]]} for s in segments
        ]

    pairs = []
    for record, (pred_ids, pred_segments) in zip(records, predictions, strict=True):
        gt_ids = read_panoptic_png(record["pan_seg_file_name"])
        gt_segments = [
            {"iscrowd": 0, **s, "area": int((gt_ids == s["id"]).sum())}
            for s in with_ids(record["segments_info"])
        ]
        file_name = f"pred_{record['image_id']}.png"
        write_panoptic_png(folder / file_name, pred_ids)
        pairs.append(
            (
                {
                    "image_id": record["image_id"],
                    "file_name": record["pan_seg_file_name"],
                    "segments_info": gt_segments,
                },
                {"file_name": file_name, "segments_info": with_ids(pred_segments)},
            )
        )
    categories = {i: {"isthing": int(isthing)} for (isthing, _), i in category_ids.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        counts = pq_compute_single_core(0, pairs, "", str(folder), categories)

    splits = {
        "": categories,
        "_th": {i: c for i, c in categories.items() if c["isthing"]},
        "_st": {i: c for i, c in categories.items() if not c["isthing"]},
        **{f"-{CATEGORIES[c]}": {i: categories[i]} for c, i in category_ids.items()},
    }
    result = {}
    for suffix, split in splits.items():
        try:
            average = counts.pq_average(split, isthing=None)[0]
        except ZeroDivisionError:
            average = {"pq": math.nan, "sq": math.nan, "rq": math.nan}
        result |= {f"{metric.upper()}{suffix}": 100 * average[metric] for metric in QUALITIES}
    return result


@settings(max_examples=150, deadline=None)
@given(cases=st.lists(images(), min_size=1, max_size=3))
def test_equals_the_reference(cases):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = [write_image(folder, i, *case[:2]) for i, case in enumerate(cases)]
        predictions = [case[2:] for case in cases]
        results = evaluate(records, [output_of(*prediction) for prediction in predictions])
        expected = reference(records, predictions, folder)
    assert list(results)[:9] == [
        f"{metric}{suffix}" for suffix in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")
    ]
    assert results == pytest.approx(expected, rel=0, abs=1e-10, nan_ok=True)  # percent


def stripes(*widths: int) -> np.ndarray:
    """A map of vertical stripes of the given widths, with ids 1, 2, ..."""
    row = np.repeat(np.arange(1, len(widths) + 1), widths)
    return np.tile(row, (2, 1))


def thing(segment_id: int, category_id: int = 0, **fields) -> dict:
    return {"id": segment_id, "category_id": category_id, "isthing": True, **fields}


def test_only_the_last_crowd_of_a_category_excuses():
    prediction = stripes(4), [thing(1)]
    for order, false_positives in ((1, 0), (-1, 1)):
        # The first crowd has one column of the prediction, the second has three.
        crowds = [thing(1, iscrowd=1), thing(2, iscrowd=1)][::order]
        matches = match_segments(stripes(1, 3), crowds, *prediction)
        assert sum(m.false_positives for m in matches.values()) == false_positives


def test_half_is_neither_a_match_nor_excused():
    prediction = stripes(2, 2), [thing(1), thing(2)]
    gt = np.where(stripes(1, 1, 1, 1) == 1, 7, 0) + np.where(stripes(2, 1, 1) == 2, 8, 0)
    matches = match_segments(gt, [thing(7), thing(8)], *prediction)[True, 0]
    assert matches.ious == [1.0, 1.0]  # void is no part of the union
    gt = np.where(stripes(1, 3) == 1, 7, 9)  # half of the first prediction is 7
    matches = match_segments(gt, [thing(7), thing(9, 1)], *prediction)
    assert matches[True, 0].ious == []
    assert matches[True, 0].false_positives == 2


def test_minus_one_is_void_in_predictions():
    segments = [thing(3)]
    gt = np.array([[3, 3, 3, 3]])
    with_zero = match_segments(gt, segments, np.array([[0, 3, 3, 3]]), segments)
    with_minus_one = match_segments(gt, segments, np.array([[-1, 3, 3, 3]]), segments)
    assert with_zero == with_minus_one
    assert with_zero[True, 0].ious == [0.75]


def test_a_true_segment_without_a_pixel_is_missed():
    gt = np.array([[1, 1, 2, 2]])
    segments = [thing(1), thing(2)]
    matches = match_segments(gt, [*segments, thing(3)], gt, segments)[True, 0]
    assert (matches.ious, matches.false_negatives, matches.false_positives) == ([1.0, 1.0], 1, 0)


@pytest.mark.parametrize(
    ("gt_segments", "pred_segments", "message"),
    [
        ([thing(1)], [thing(1), thing(2)], r"gt\.png: pixels with ids .* lacks: 2$"),
        ([thing(1), thing(2)], [thing(1)], r"a\.jpg: pixels with ids .* lacks: 2$"),
        ([thing(1), thing(2)], [thing(1), thing(2), thing(5)], r"a\.jpg: .* no pixel has: 5$"),
        ([thing(1), thing(2), thing(2)], [], r"gt\.png: ids .* must .* differ.* 1, 2, 2$"),
        ([thing(0), thing(1), thing(2)], [], r"gt\.png: ids .* must be positive"),
        ([thing(-1), thing(1), thing(2)], [], r"gt\.png: ids .* must be positive"),
        ([thing(1), {"id": 2, "isthing": True}], [], r"gt\.png: .* has no category_id"),
    ],
)
def test_maps_and_lists_that_disagree(gt_segments, pred_segments, message):
    with pytest.raises(UserError, match=message):
        match_segments(
            stripes(1, 1),
            gt_segments,
            stripes(1, 1),
            pred_segments,
            gt_source="gt.png",
            pred_source="a.jpg",
        )


def test_only_a_few_of_many_unknown_ids_are_named():
    for number, listed in ((5, r"1, 2, 3, 4, 5$"), (10_000, r"1, 2, 3, 4, 5, \.\.\.$")):
        noise = np.arange(1, number + 1)[None]
        with pytest.raises(UserError, match=f"lacks: {listed}"):
            match_segments(noise, [], noise, [])


def test_sizes_that_differ_are_named(tmp_path):
    record = write_image(tmp_path, 1, stripes(2, 1), [thing(1), thing(2)])
    output = output_of(stripes(1, 1), [thing(1), thing(2)])
    with pytest.raises(UserError, match=r"1\.jpg is 2 x 2 pixels.*1\.png is 2 x 3"):
        evaluate([record], [output])


@pytest.mark.parametrize("segment", [thing(1, 2), {**thing(1, 0), "isthing": False}])
def test_unknown_categories_are_named(tmp_path, segment):
    good = [thing(1)]
    with pytest.raises(UserError, match=r"prediction for 1\.jpg: segment 1 has category_id"):
        evaluate([write_image(tmp_path, 1, stripes(2), good)], [output_of(stripes(2), [segment])])
    with pytest.raises(UserError, match=r"1\.png: segment 1 has category_id"):
        evaluate([write_image(tmp_path, 1, stripes(2), [segment])], [output_of(stripes(2), good)])


def test_an_output_without_panoptic_seg_is_named(tmp_path):
    record = write_image(tmp_path, 1, stripes(2), [thing(1)])
    with pytest.raises(UserError, match=r"1\.jpg has no panoptic_seg, only \['sem_seg'\]"):
        evaluate([record], [{"sem_seg": torch.zeros(1)}])


def test_a_record_without_panoptic_ground_truth_is_named():
    with pytest.raises(UserError, match=r"1\.jpg: no panoptic ground truth"):
        evaluate([{"file_name": "1.jpg", "image_id": 1}], [output_of(stripes(2), [thing(1)])])


def test_ids_may_be_an_array(tmp_path):
    segments = [thing(1)]
    record = write_image(tmp_path, 1, stripes(2), segments)
    assert evaluate([record], [{"panoptic_seg": (stripes(2), segments)}])["PQ"] == 100


def random_image(seed: int) -> tuple[np.ndarray, list[dict], np.ndarray, list[dict]]:
    """Truth and prediction of a larger image, with IoUs of many digits."""
    rng = np.random.default_rng(seed)

    def segments(ids: np.ndarray) -> list[dict]:
        categories = sorted(CATEGORIES)
        return [
            {"id": int(i), "category_id": categories[i % 4][1], "isthing": categories[i % 4][0]}
            for i in np.unique(ids)
        ]

    gt_ids = np.kron(rng.integers(1, 9, (4, 5)), np.ones((9, 7), int))
    pred_ids = np.where(rng.random(gt_ids.shape) < 0.2, rng.integers(1, 9, gt_ids.shape), gt_ids)
    return gt_ids, segments(gt_ids), pred_ids, segments(pred_ids)


def test_processes_order_and_repeats_change_nothing(tmp_path, evaluate_in_processes):
    cases = [random_image(seed) for seed in range(7)]
    records = [write_image(tmp_path, i, *case[:2]) for i, case in enumerate(cases)]
    outputs = [output_of(*case[2:]) for case in cases]
    expected = evaluate(records, outputs)
    assert len(set(expected.values())) > 5
    for num_parts in (1, 2, 3, 7):
        parts = in_parts(np.random.default_rng(num_parts), num_parts, records, outputs)
        results = evaluate_in_processes(lambda: PanopticQualityEvaluator(**DATASET), parts)
        assert results["panoptic_seg"] == expected  # to the last digit


def test_reset_forgets(tmp_path):
    record = write_image(tmp_path, 1, stripes(2, 2), [thing(1), thing(2)])
    evaluator = PanopticQualityEvaluator(**DATASET)
    evaluator.process([record], [output_of(stripes(2, 2), [thing(1, 1), thing(2, 1)])])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 0
    evaluator.reset()
    evaluator.process([record], [output_of(stripes(2, 2), [thing(1), thing(2)])])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100


def test_nothing_to_evaluate_is_nan_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        results = evaluate([], [])
    assert all(math.isnan(value) for value in results.values())
    assert "All: no segments" in caplog.text

    caplog.clear()
    record = write_image(tmp_path, 1, stripes(2), [thing(1)])
    with caplog.at_level(logging.WARNING):
        results = evaluate([record], [output_of(stripes(2), [thing(1)])])
    assert results["PQ"] == results["PQ_th"] == results["PQ-cat"] == 100
    assert math.isnan(results["PQ_st"])
    assert math.isnan(results["PQ-dog"])
    assert "Stuff: no segments" in caplog.text
    assert "All" not in caplog.text


def test_the_log_has_both_tables(tmp_path, caplog):
    record = write_image(tmp_path, 1, stripes(2), [thing(1)])
    with caplog.at_level(logging.INFO):
        evaluate([record], [output_of(stripes(2), [thing(1)])])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines()]
    assert ["", "PQ", "SQ", "RQ", "#categories"] in rows
    assert ["Things", "100.000", "100.000", "100.000", "1"] in rows
    assert ["cat", "100.000", "100.000", "100.000", "1", "0", "0"] in rows


def test_from_dataset_full_label_space(tmp_path):
    name = "panoptic_quality_test_full"
    MetadataCatalog.get(name).set(
        thing_classes=["cat", "dog"],
        stuff_classes=["sky", "cat", "dog", "sea"],
        thing_sem_seg_ids=(1, 2),
    )
    try:
        results = PanopticQualityEvaluator.from_dataset(name).evaluate()["panoptic_seg"]
    finally:
        MetadataCatalog.remove(name)
    assert [key for key in results if key.startswith("PQ-")] == [
        "PQ-cat", "PQ-dog", "PQ-sky", "PQ-sea",
    ]  # fmt: skip


def _evaluate_on_rank(rank: int, init_method: str, parts: list, result_file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=init_method, rank=rank, world_size=len(parts)
    )
    results = {}
    evaluators = [
        PanopticQualityEvaluator(**DATASET),
        SemSegIoUEvaluator(stuff_classes=STUFF, thing_sem_seg_ids=(0, 0)),
    ]
    for evaluator in evaluators:
        evaluator.process(*parts[rank])
        result = evaluator.evaluate()
        assert (result is None) == (rank != 0)
        results |= result or {}
    if rank == 0:
        Path(result_file).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_gloo_processes(tmp_path):
    cases = [random_image(seed) for seed in range(5)]
    records = [write_image(tmp_path, i, *case[:2]) for i, case in enumerate(cases)]
    outputs = [output_of(*case[2:]) for case in cases]
    for output in outputs:
        output["sem_seg"] = torch.randn(3, *output["panoptic_seg"][0].shape)
    parts = [(records[:2], outputs[:2]), (records[2:], outputs[2:])]
    result_file = tmp_path / "result.json"
    torch.multiprocessing.spawn(
        _evaluate_on_rank,
        (f"file://{tmp_path / 'rendezvous'}", parts, str(result_file)),
        nprocs=2,
    )
    results = json.loads(result_file.read_text())
    assert results["panoptic_seg"] == evaluate(records, outputs)
    sem_seg = SemSegIoUEvaluator(stuff_classes=STUFF, thing_sem_seg_ids=(0, 0))
    sem_seg.process(records, outputs)
    assert results["sem_seg"] == sem_seg.evaluate()["sem_seg"]


def test_segments_of_a_large_map_are_matched():
    ids = np.kron(np.arange(1, 33).reshape(4, 8), np.ones((256, 256), int))
    segments = [thing(i) for i in range(1, 33)]
    matches = match_segments(ids, segments, np.roll(ids, 9, axis=1), segments)
    assert matches[True, 0].ious == pytest.approx([(256 - 9) / (256 + 9)] * 32)
