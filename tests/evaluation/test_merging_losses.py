"""What merging drops, and its price, against predictions repaired pixel by pixel."""

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext.evaluation.analysis import PanopticImage, totals_of
from panoptic_fpn_ext.evaluation.merging_losses import (
    REASONS,
    MergingThresholds,
    dropped_segments,
    merging_prices,
)
from panoptic_fpn_ext.evaluation.panoptic_matching import matching, segment_table
from panoptic_fpn_ext.modeling.merging import merge_panoptic

from ..conftest import CPU, moved
from .test_build import config
from .test_panoptic_errors import CAT, CATEGORIES, CROWDS, DOG, SEA, SKY, naive_pq, row, segments

THINGS = 9  # the semantic class of all things


def merged(masks, scores, classes, labels, *, score=0.5, overlap=0.5, area=4) -> dict:
    """The outputs for an image: detections and semantic classes (H, W), and their merging."""
    instances = Instances(labels.shape)
    instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *labels.shape))
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.tensor([c for _, c in classes], dtype=torch.int64)
    logits = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 10).permute(2, 0, 1)
    panoptic = merge_panoptic(
        instances,
        torch.from_numpy(labels).long(),
        thing_sem_seg_ids=[THINGS],
        overlap_threshold=overlap,
        stuff_area_thresh=area,
        instances_score_thresh=score,
    )
    return {"panoptic_seg": panoptic, "instances": instances, "sem_seg": logits.float()}


def checked(
    gt_ids, gt_segments, output, *, score=0.5, area=4, device=CPU
) -> dict[str, dict[str, float]]:
    """Prices, which are those of predictions that the oracle repairs."""
    pred_ids, pred_segments = output["panoptic_seg"]
    pred_ids = pred_ids.numpy()
    table = segment_table(gt_ids, gt_segments, pred_ids, pred_segments)
    image = PanopticImage.of(table)
    thresholds = MergingThresholds(score, area)
    dropped = dropped_segments(image.segments, gt_ids, moved(output, device), thresholds)
    assert dropped is not None
    prices = merging_prices([dropped], totals_of([image.matches], CATEGORIES))

    def pixels(mask) -> set[int]:
        return set(np.flatnonzero(mask).tolist())

    labelled = pixels(gt_ids > 0)
    found = matching(table)
    true = [pixels(gt_ids == s["id"]) for s in gt_segments]
    truth = list(zip(table.gt_categories, true, strict=True))
    counted = [
        (table.pred_categories[p], pixels(pred_ids == pred_segments[p]["id"]))
        for p in (*found.pairs, *found.false_positives)
    ]
    detections = output["instances"]
    kept = {s["instance_id"] for s in pred_segments if s["isthing"]}
    in_map = {s["category_id"] for s in pred_segments if not s["isthing"]}
    added = {reason: [] for reason in REASONS}
    for g in found.false_negatives:
        isthing, category = table.gt_categories[g]
        candidates = []
        if isthing:
            for k, mask in enumerate(detections.pred_masks.numpy()):
                if k not in kept and detections.pred_classes[k] == category:
                    reason = "score" if detections.scores[k].item() < score else "overlap"
                    candidates.append((pixels(mask), reason))
        elif category not in in_map:
            labels = output["sem_seg"].argmax(0).numpy()
            candidates.append((pixels((labels == category) & (pred_ids == 0)), "area"))
        ious = [len(true[g] & m) / len(true[g] | (m & labelled)) for m, _ in candidates if true[g]]
        if ious and max(ious) > 0.5:
            mask, reason = candidates[int(np.argmax(ious))]
            added[reason].append((table.gt_categories[g], mask))
    CROWDS[0] = []
    before = naive_pq(truth, counted)
    for reason in REASONS:
        assert prices[reason]["missed"] == len(added[reason])
        # What is added comes first: it takes a true segment from no other, as these are missed.
        for key, value in naive_pq(truth, [*added[reason], *counted]).items():
            price = prices[reason][key]
            assert before[key] + price == pytest.approx(value, abs=1e-9, nan_ok=True), (reason, key)
    return prices


def test_one_dropped_by_each(device):
    gt = row((1, 10), (2, 10), (3, 10), (4, 3), (0, 2))
    masks = [
        row((1, 8), (0, 27)),  # a cat, 8 of 10 pixels, too low a score
        row((0, 10), (1, 10), (0, 15)),  # a dog, covered by the cat that is drawn first
        row((0, 11), (1, 9), (0, 15)),
        row((0, 20), (1, 10), (0, 5)),  # the third is found
    ]
    labels = row((THINGS, 30), (SKY[1], 3), (THINGS, 2))
    output = merged(masks, [0.3, 0.8, 0.9, 0.7], [CAT, DOG, CAT, CAT], labels)
    prices = checked(gt, segments(CAT, DOG, CAT, SKY), output, device=device)
    assert {reason: price["missed"] for reason, price in prices.items()} == dict.fromkeys(
        REASONS, 1
    )
    # Cats: one of two found, and a false one; a second one with IoU 0.8.
    before, after = 100 * 1 / (1 + 1 / 2 + 1 / 2), 100 * 1.8 / (2 + 1 / 2)
    assert prices["score"]["PQ_th"] == pytest.approx((after - before) / 2)  # of two classes
    assert prices["overlap"]["PQ_th"] == pytest.approx(50)
    assert prices["area"]["PQ_st"] == pytest.approx(100) and prices["area"]["PQ_th"] == 0


def test_what_was_not_there_is_no_fault_of_merging():
    gt = row((1, 10), (2, 10), (3, 10))
    masks = [row((1, 4), (0, 26)), row((0, 10), (1, 10), (0, 10))]
    labels = row((THINGS, 20), (SKY[1], 3), (THINGS, 7))
    # A poor outline, another class, a small part.
    output = merged(masks, [0.3, 0.3], [CAT, CAT], labels)
    prices = checked(gt, segments(CAT, DOG, SKY), output)
    assert not any(price["missed"] for price in prices.values())


@st.composite
def scenes(draw):
    size = draw(st.tuples(st.integers(2, 7), st.integers(2, 9)))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    def rectangle() -> np.ndarray:
        mask = np.zeros(size, bool)
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, side + 1, 2)) for side in size)
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
        return mask

    gt = np.zeros(size, np.int32)
    categories = [CATEGORIES_OF[k] for k in rng.permutation(4)[: rng.integers(1, 5)]]
    categories += [CAT] * int(rng.integers(2))
    for k in range(1, len(categories) + 1):
        gt[rectangle()] = k
    masks, classes = [], []
    for _ in range(rng.integers(0, 6)):
        near = gt == rng.integers(1, len(categories) + 1)
        masks.append(np.where(rng.random(size) < 0.85, near, rectangle()))
        classes.append((CAT, DOG)[rng.integers(2)])
    by_segment = np.array([THINGS, *(THINGS if t else c for t, c in categories)])
    labels = np.where(rng.random(size) < 0.9, by_segment[gt], SKY[1])
    thresholds = {
        "score": float(rng.choice([0.0, 0.4, 0.6])),
        "area": int(rng.choice([0, 3, 12])),
    }
    output = merged(
        masks,
        rng.choice([0.3, 0.5, 0.9], len(masks)),
        classes,
        labels,
        overlap=float(rng.choice([0.2, 0.5, 1.0])),
        **thresholds,
    )
    return gt, segments(*categories), output, thresholds


CATEGORIES_OF = (CAT, DOG, SKY, SEA)


@settings(max_examples=200, deadline=None)
@given(scene=scenes())
def test_prices_are_those_of_repaired_predictions(scene):
    gt, infos, output, thresholds = scene
    checked(gt, infos, output, **thresholds)


def test_what_the_outputs_do_not_tell():
    gt = row((1, 10))
    output = merged([row((1, 10))], [0.9], [CAT], row((THINGS, 10)))
    missed = PanopticImage.of(segment_table(gt, segments(CAT), gt * 0, [])).segments
    thresholds = MergingThresholds(0.5, 4)
    assert dropped_segments(missed, gt, output, thresholds) is not None
    for key in ("instances", "sem_seg"):
        rest = {k: v for k, v in output.items() if k != key}
        assert dropped_segments(missed, gt, rest, thresholds) is None
    ids, infos = output["panoptic_seg"]
    foreign = [{k: v for k, v in infos[0].items() if k != "instance_id"}]
    other = {**output, "panoptic_seg": (ids, foreign)}
    assert dropped_segments(missed, gt, other, thresholds) is None
    assert merging_prices([[], None], {}) is None


def test_only_models_that_merge_are_asked():
    keys = {"MODEL__PANOPTIC_FPN__COMBINE__STUFF_AREA_LIMIT": 7}
    assert MergingThresholds.of_config(config(**keys)) == MergingThresholds(0.5, 7)
    for keys in (
        {"MODEL__META_ARCHITECTURE": "SemanticFPN"},
        {"MODEL__PANOPTIC_FPN__OUTPUTS": ["panoptic_seg", "sem_seg"]},
    ):
        assert MergingThresholds.of_config(config(**keys)) is None
