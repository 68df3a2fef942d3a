"""Matching of random maps against the definition of panoptic quality, by sets of pixels."""

from collections import defaultdict

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext.evaluation.panoptic_matching import match_segments

MAX_ID = 256**3 - 1
# Neighbours, and those whose products or sums would collide.
IDS = [1, 2, 255, 256, 257, 65535, 65536, 65537, 2**23, MAX_ID - 1, MAX_ID]
CATEGORIES = [(True, 0), (True, 1), (False, 0), (False, 1)]


@st.composite
def maps(draw, size: int) -> tuple[np.ndarray, list[dict]]:
    """A row of pixels in runs and its segments; categories are frequently the same."""
    ids = draw(st.lists(st.sampled_from(IDS) | st.integers(1, MAX_ID), max_size=5, unique=True))
    pixels = draw(st.lists(st.sampled_from([0, *ids]), min_size=size, max_size=size))
    pixels = sorted(pixels) if draw(st.booleans()) else pixels
    segments = []
    for segment_id in sorted(set(pixels) - {0}, reverse=draw(st.booleans())):
        isthing, category = draw(st.sampled_from(CATEGORIES))
        segments.append({"id": segment_id, "category_id": category, "isthing": isthing})
    return np.array(pixels), segments


@st.composite
def cases(draw) -> tuple:
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    gt_ids, gt_segments = draw(maps(height * width))
    pred_ids, pred_segments = draw(maps(height * width))
    if draw(st.booleans()):  # a copy but for some pixels, with other ids
        table = {i: (i + 7) % MAX_ID + 1 for i in gt_ids.tolist()} | {0: 0}
        pred_ids = np.array([table[i] for i in gt_ids.tolist()])
        pred_ids[: draw(st.integers(0, height * width))] = 0
        present = set(pred_ids.tolist())
        pred_segments = [{**s, "id": table[s["id"]]} for s in gt_segments]
        pred_segments = [s for s in pred_segments if s["id"] in present]
    gt_segments = [{**s, "iscrowd": draw(st.sampled_from([0, 0, 1]))} for s in gt_segments]
    shape = height, width
    return gt_ids.reshape(shape), gt_segments, pred_ids.reshape(shape), pred_segments


def naive(gt_ids, gt_segments, pred_ids, pred_segments) -> dict:
    """For each category its IoUs, false positives and false negatives."""

    def pixels(ids: np.ndarray, wanted: int) -> set[int]:
        return {k for k, found in enumerate(ids.ravel().tolist()) if found == wanted}

    def category(segment: dict) -> tuple[bool, int]:
        return segment["isthing"], segment["category_id"]

    void = pixels(gt_ids, 0)
    found = defaultdict(lambda: [[], 0, 0])
    matched = []
    for truth in gt_segments:
        if truth["iscrowd"]:
            continue
        true = pixels(gt_ids, truth["id"])
        partner = None
        for predicted in pred_segments:
            if category(predicted) == category(truth):
                ours = pixels(pred_ids, predicted["id"])
                iou = len(true & ours) / len((true | ours) - void)
                if iou > 0.5:
                    assert partner is None  # there is one at most
                    partner = predicted["id"]
                    found[category(truth)][0].append(iou)
        found[category(truth)][2] += partner is None
        matched.append(partner)
    for predicted in pred_segments:
        if predicted["id"] in matched:
            continue
        ours = pixels(pred_ids, predicted["id"])
        excused = set(void)
        # Of several crowds of a category the last one alone, as in panopticapi.
        crowds = [s for s in gt_segments if s["iscrowd"] and category(s) == category(predicted)]
        for crowd in crowds[-1:]:
            excused |= pixels(gt_ids, crowd["id"])
        found[category(predicted)][1] += 2 * len(ours & excused) <= len(ours)
    return found


@settings(max_examples=300, deadline=None)
@given(cases())
@example((np.zeros((1, 1), int), [], np.zeros((1, 1), int), []))
@example((np.zeros((1, 1), int), [], np.full((1, 1), MAX_ID), [
    {"id": MAX_ID, "category_id": 0, "isthing": True}
]))  # fmt: skip
def test_equals_the_definition(case):
    found = {
        category: (sorted(m.ious), m.false_positives, m.false_negatives)
        for category, m in match_segments(*case).items()
    }
    expected = {c: (sorted(ious), fp, fn) for c, (ious, fp, fn) in naive(*case).items()}
    nothing = ([], 0, 0)
    for category in CATEGORIES:
        assert found.pop(category, nothing) == expected.get(category, nothing)
    assert not found
    for matches in match_segments(*case).values():
        if matches.true_positives + matches.false_positives + matches.false_negatives:
            assert 0 <= matches.pq <= 1
            assert abs(matches.pq - matches.sq * matches.rq) < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4).flatmap(lambda size: maps(size * 6)), st.integers(1, MAX_ID))
def test_the_truth_itself_is_perfect(truth, shift):
    """Whatever its ids are called."""
    ids, segments = truth
    table = {i: (i - 1 + shift) % MAX_ID + 1 for i in ids.tolist()} | {0: 0}
    renamed = np.array([table[i] for i in ids.tolist()])
    predicted = [{**s, "id": table[s["id"]]} for s in segments]
    for matches in match_segments(ids[None], segments, renamed[None], predicted).values():
        assert (matches.pq, matches.false_positives, matches.false_negatives) == (1.0, 0, 0)
