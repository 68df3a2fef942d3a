"""Kinds of errors and their prices, against repaired predictions whose PQ is computed anew."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings

from panoptic_fpn_ext.evaluation.analysis import PanopticImage, analysis, mean_pq, totals_of
from panoptic_fpn_ext.evaluation.bootstrap import interval, resamples
from panoptic_fpn_ext.evaluation.boundary import boundary_iou
from panoptic_fpn_ext.evaluation.instance_ap import InstanceAPEvaluator, _resampled_ap
from panoptic_fpn_ext.evaluation.panoptic_errors import KINDS, find_errors
from panoptic_fpn_ext.evaluation.panoptic_matching import category_of, matching, segment_table
from panoptic_fpn_ext.evaluation.panoptic_quality import PanopticQualityEvaluator
from panoptic_fpn_ext.evaluation.sem_seg_iou import SemSegIoUEvaluator

from .test_panoptic_quality import CATEGORIES, DATASET, images, output_of, write_image

CAT, DOG, SKY, SEA = CATEGORIES


def row(*runs: tuple[int, int]) -> np.ndarray:
    """One row of pixels: runs of (segment id, length)."""
    return np.repeat([i for i, _ in runs], [n for _, n in runs])[None]


def segments(*categories: tuple[bool, int]) -> list[dict]:
    """Segments 1, 2, ... of these categories."""
    return [{"id": i, "isthing": t, "category_id": c} for i, (t, c) in enumerate(categories, 1)]


def naive_pq(truth: list, predictions: list) -> dict[str, float]:
    """PQ, PQ_th and PQ_st of masks, which may lie over each other: a loop over all pairs.

    Args:
        truth: (category, mask) of true segments, crowds left out, each mask a set of pixels.
        predictions: (category, mask) of those that count or match.
    """
    labelled = set().union(*(mask for _, mask in truth), *CROWDS[0])
    sums = defaultdict(lambda: [0.0, 0, 0, 0])
    used = set()
    for category, mask in truth:
        for k, (other, predicted) in enumerate(predictions):
            union = mask | (predicted & labelled)
            iou = len(mask & predicted) / len(union) if union else 0
            if other == category and iou > 0.5 and k not in used:
                used.add(k)
                sums[category][0] += iou
                sums[category][1] += 1
                break
        else:
            sums[category][3] += 1
    for k, (category, _) in enumerate(predictions):
        sums[category][2] += k not in used
    pq = {c: 100 * s / (tp + (fp + fn) / 2) for c, (s, tp, fp, fn) in sums.items() if tp + fp + fn}
    splits = {"PQ": pq, "PQ_th": {c: v for c, v in pq.items() if c[0]}}
    splits["PQ_st"] = {c: v for c, v in pq.items() if not c[0]}
    return {key: sum(v.values()) / len(v) if v else math.nan for key, v in splits.items()}


CROWDS = [[]]  # the masks of crowds, which are no void


def repaired(table, found, errors, kind: str, gt_ids, pred_ids) -> tuple[list, list]:
    """Truth and prediction as sets of pixels, the prediction without the errors of one kind."""

    def masks(ids, infos):
        flat = ids.reshape(-1)
        return [set(np.flatnonzero(flat == s["id"]).tolist()) for s in infos]

    true, predicted = masks(gt_ids, table.gt_segments), masks(pred_ids, table.pred_segments)
    CROWDS[0] = [m for m, s in zip(true, table.gt_segments, strict=True) if s.get("iscrowd")]
    labelled = set().union(*true)
    gt_categories = [category_of(s) for s in table.gt_segments]
    pred_categories = [category_of(s) for s in table.pred_segments]
    counted = [*found.pairs, *found.false_positives]
    result = {p: [(pred_categories[p], predicted[p])] for p in counted}
    added = []
    missed = [g for g, k in errors.false_negatives.items() if k == kind]
    false = [p for p, k in errors.false_positives.items() if k == kind]

    def iou(g, p):
        return len(true[g] & predicted[p]) / len(true[g] | (predicted[p] & labelled))

    if kind in ("class", "thing_stuff"):
        for p in false:
            (g,) = [g for g in missed if iou(g, p) > 0.5]
            result[p] = [(gt_categories[g], predicted[p])]
    elif kind == "split":
        whole = defaultdict(set)
        for p in false:
            held = predicted[p] & labelled
            (g,) = [
                g
                for g, mask in enumerate(true)
                if 2 * len(mask & held) > len(held) and gt_categories[g] == pred_categories[p]
            ]
            whole[g] |= predicted[p]
            result[p] = []
        for g, mask in whole.items():
            owner = [p for p, matched in found.pairs.items() if matched == g]
            for p in owner:
                result[p] = [(gt_categories[g], predicted[p] | mask)]
            if not owner:
                assert g in missed
                added.append((gt_categories[g], mask))
    elif kind == "merged":
        for p in {*false, *found.pairs}:
            held = [
                g
                for g in missed
                if gt_categories[g] == pred_categories[p]
                and 2 * len(true[g] & predicted[p]) > len(true[g])
            ]
            if held:
                held += [found.pairs[p]] if p in found.pairs else []
                result[p] = [(pred_categories[p], true[g] & predicted[p]) for g in held]
    else:
        for p in false:
            result[p] = []
        added += [(gt_categories[g], true[g]) for g in missed]
    truth = [
        (c, mask)
        for c, mask, s in zip(gt_categories, true, table.gt_segments, strict=True)
        if not s.get("iscrowd")
    ]
    return truth, [*added, *(item for items in result.values() for item in items)]


def check_prices(case) -> PanopticImage:
    gt_ids, _, pred_ids, _ = case
    table = segment_table(*case)
    found = matching(table)
    errors = find_errors(table, found)
    assert sorted(errors.false_negatives) == found.false_negatives
    assert sorted(errors.false_positives) == found.false_positives
    image = PanopticImage.of(table)
    result = analysis([image], CATEGORIES)
    counts = [(v["false_positives"], v["false_negatives"]) for v in result["prices"].values()]
    assert tuple(map(sum, zip(*counts, strict=True))) == (
        len(found.false_positives),
        len(found.false_negatives),
    )
    for kind in KINDS:
        expected = naive_pq(*repaired(table, found, errors, kind, gt_ids, pred_ids))
        for key, value in expected.items():
            price = result["prices"][kind][key]
            assert result[key] + price == pytest.approx(value, abs=1e-9, nan_ok=True), (kind, key)
    return image


@settings(max_examples=200, deadline=None)
@given(case=images())
def test_prices_are_those_of_repaired_predictions(case):
    check_prices(case)


# Of each kind an image with errors of this kind alone: truth, prediction, errors (FP, FN).
ONE_OF_EACH = {
    "class": (row((1, 10)), [CAT], row((1, 8), (0, 2)), [DOG], 1, 1),
    "thing_stuff": (row((1, 10)), [CAT], row((1, 8), (0, 2)), [SKY], 1, 1),
    "split": (row((1, 10)), [CAT], row((1, 4), (2, 5), (0, 1)), [CAT, CAT], 2, 1),
    "merged": (row((1, 5), (2, 5)), [CAT, CAT], row((1, 10)), [CAT], 1, 2),
    "outline": (row((1, 10), (2, 10)), [CAT, SEA], row((1, 4), (2, 16)), [CAT, SEA], 1, 1),
    "missed": (row((1, 10), (2, 10)), [CAT, SEA], row((0, 10), (1, 10)), [SEA], 0, 1),
    "made_up": (row((1, 20)), [SEA], row((1, 16), (2, 4)), [SEA, CAT], 1, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_error_of_each_kind(kind):
    gt, true, pred, predicted, fp, fn = ONE_OF_EACH[kind]
    image = check_prices((gt, segments(*true), pred, segments(*predicted)))
    prices = analysis([image], CATEGORIES)["prices"]
    found = {
        key: (price["false_positives"], price["false_negatives"])
        for key, price in prices.items()
        if price["false_positives"] or price["false_negatives"]
    }
    assert found == {kind: (fp, fn)}
    assert prices[kind]["PQ"] > 0
    assert all(
        price["PQ"] == 0
        for other, price in prices.items()
        if other not in (kind, "perfect_outlines")
    )


def test_prices_by_hand():
    # A cat of 10 pixels in pieces of 4 and 5: PQ 0, as one segment IoU 0.9.
    gt, true, pred, predicted, *_ = ONE_OF_EACH["split"]
    image = PanopticImage.of(segment_table(gt, segments(*true), pred, segments(*predicted)))
    prices = analysis([image], CATEGORIES)["prices"]
    assert prices["split"]["PQ"] == prices["split"]["PQ_th"] == pytest.approx(90)
    # The dog is no category any more once it is a cat: IoU 0.8.
    gt, true, pred, predicted, *_ = ONE_OF_EACH["class"]
    image = PanopticImage.of(segment_table(gt, segments(*true), pred, segments(*predicted)))
    assert analysis([image], CATEGORIES)["prices"]["class"]["PQ"] == pytest.approx(80)


def test_pieces_and_neighbours_of_what_matches():
    # 6 of 10 pixels match, 3 are a false segment: together IoU 0.9 in place of 0.6 and an error.
    case = row((1, 10)), segments(CAT), row((1, 6), (2, 3), (0, 1)), segments(CAT, CAT)
    result = analysis([check_prices(case)], CATEGORIES)
    assert result["prices"]["split"]["PQ"] == pytest.approx(90 - 60 / 1.5)
    # A prediction matches 10 pixels and swallows 4 of another.
    case = row((1, 10), (2, 4)), segments(CAT, CAT), row((1, 14)), segments(CAT)
    result = analysis([check_prices(case)], CATEGORIES)
    assert result["prices"]["merged"]["PQ"] == pytest.approx(100 - 100 * 10 / 14 / 1.5)


def test_perfect_outlines_are_rq():
    case = row((1, 10)), segments(CAT), row((1, 6), (0, 4)), segments(CAT)
    result = analysis([PanopticImage.of(segment_table(*case))], CATEGORIES)
    assert result["prices"]["perfect_outlines"]["PQ"] == pytest.approx(40)


def test_sizes_count_each_error_once():
    gt = np.ones((120, 120), int)
    gt[:20, :20] = 2
    pred = np.ones((120, 120), int)
    case = gt, segments(SKY, CAT), pred, segments(SKY)
    sizes = analysis([PanopticImage.of(segment_table(*case))], CATEGORIES)["sizes"]
    assert [sizes[s]["segments"] for s in ("small", "medium", "large")] == [1, 0, 1]
    assert sizes["small"]["PQ"] == 0 and sizes["small"]["errors"]["missed"] == 1
    assert sizes["large"]["PQ"] == pytest.approx(100 * (120**2 - 400) / 120**2)


def naive_border(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask that have another pixel in the square around them, or the image's end."""
    height, length = mask.shape
    found = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        for v in range(y - width, y + width + 1):
            for u in range(x - width, x + width + 1):
                inside = 0 <= v < height and 0 <= u < length
                found[y, x] |= not inside or not mask[v, u]
    return found


def test_boundary_iou_equals_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    gt = np.kron(rng.integers(0, 4, (4, 5)), np.ones((20, 20), int))  # diagonal 128: width 3
    pred = np.roll(gt, (2, 3), (0, 1))
    infos = [s for s in segments(CAT, DOG, SKY) if (gt == s["id"]).any()]
    table = segment_table(gt, infos, pred, infos)
    found = boundary_iou(table, gt, pred)
    for a, true in enumerate(infos):
        for b, predicted in enumerate(infos):
            masks = gt == true["id"], pred == predicted["id"]
            ious = []
            for t, p in (masks, tuple(naive_border(m, 3) for m in masks)):
                union = t | (p & (gt > 0))
                ious.append((t & p).sum() / union.sum())
            assert found[a, b] == pytest.approx(min(ious))
    evaluator = PanopticQualityEvaluator(**DATASET, boundary=True)
    record = write_image(tmp_path, 1, gt, infos)
    evaluator.process([record], [output_of(pred, infos)])
    scores = evaluator.evaluate()["panoptic_seg"]
    assert scores["boundary_PQ"] <= scores["PQ"]
    matches = matching(table, found).by_category(table)
    assert scores["boundary_PQ"] == mean_pq(totals_of([matches], CATEGORIES))["PQ"]
    assert not [key for key in scores if key.endswith("low")]


def test_intervals_are_those_of_resampled_images(tmp_path):
    rng = np.random.default_rng(1)
    evaluator = PanopticQualityEvaluator(**DATASET)
    evaluator.scores_intervals = True
    for k in range(8):
        gt = rng.integers(1, 4, (6, 6)).repeat(4, 0).repeat(4, 1)
        pred = np.roll(gt, rng.integers(0, 3), 1)
        record = write_image(tmp_path, k, gt, segments(CAT, DOG, SKY))
        evaluator.process([record], [output_of(pred, segments(CAT, DOG, SKY))])
    scores = evaluator.evaluate()["panoptic_seg"]
    values = []
    for weights in resamples(8):
        chosen = [
            image
            for image, n in zip(evaluator.images.values(), weights, strict=True)
            for _ in range(int(n))
        ]
        values.append(mean_pq(totals_of((i.matches for i in chosen), CATEGORIES)))
    for key in ("PQ", "PQ_th", "PQ_st"):
        ends = np.percentile([v[key] for v in values], [2.5, 97.5])
        assert [scores[f"{key}_low"], scores[f"{key}_high"]] == pytest.approx(list(ends))
        assert scores[f"{key}_low"] <= scores[key] <= scores[f"{key}_high"]


def test_an_interval_of_a_mean():
    data = np.random.default_rng(0).normal(size=400)
    low, high = interval(lambda weights: weights @ data / 400, 400)
    assert high - low == pytest.approx(2 * 1.96 * data.std() / 20, rel=0.1)


def test_interval_of_miou_is_that_of_repeated_images(shapes_predictions):
    records, outputs = shapes_predictions
    evaluator = SemSegIoUEvaluator.from_dataset("shapes_val")
    evaluator.process(records, outputs)
    evaluator.evaluate()
    images = list(evaluator.images.values())
    values = [
        evaluator._scores(
            evaluator._confusion(
                image for image, n in zip(images, row, strict=True) for _ in range(int(n))
            )
        )["mIoU"]
        for row in resamples(len(images))
    ]
    expected = np.percentile(values, [2.5, 97.5])
    assert evaluator.intervals()["sem_seg"]["mIoU"] == pytest.approx(tuple(expected))


def test_resampled_ap_is_that_of_repeated_images(shapes_predictions, shapes_without_json):
    records, outputs = shapes_predictions
    evaluator = InstanceAPEvaluator.from_dataset(shapes_without_json)
    evaluator.process(records, outputs)
    evaluator.evaluate()
    weights = np.array([[2, 0, 1, 0, 3, 0], [1, 1, 1, 1, 1, 1]])
    found = _resampled_ap(evaluator._evaluations["segm"], weights)
    for row, value in zip(weights, found, strict=True):
        again = InstanceAPEvaluator.from_dataset(shapes_without_json)
        for k, number in enumerate(row):
            for copy in range(number):  # under another name, or it would count once
                name = {"image_id": f"{k}-{copy}", "file_name": f"{k}-{copy}"}
                again.process([{**records[k], **name}], [outputs[k]])
        assert again.evaluate()["segm"]["AP"] == pytest.approx(value, abs=1e-9)
