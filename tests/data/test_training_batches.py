"""The order of a training, and that it goes on wherever it was."""

import multiprocessing
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from panoptic_fpn_ext.data.training_batches import (
    TrainingBatches,
    same_random_state,
    seed_everything,
)
from panoptic_fpn_ext.engine import launch

RECORDS = [{"id": k, "width": 1 + k % 3, "height": 2} for k in range(11)]


def draw(record: dict) -> tuple:
    """A mapper that draws from all random states."""
    return record["id"], random.random(), np.random.rand(), torch.rand(()).item()


def training_sampler(seed: int) -> TrainingSampler:
    return TrainingSampler(len(RECORDS), seed=seed)


def repeating_sampler(seed: int) -> RepeatFactorTrainingSampler:
    return RepeatFactorTrainingSampler(torch.linspace(1, 2.5, len(RECORDS)), seed=seed)


def batches(sampler=training_sampler, **arguments) -> TrainingBatches:
    arguments = {"batch_size": 3, "seed": 5, **arguments}
    return TrainingBatches(RECORDS, draw, sampler, **arguments)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sampler", [training_sampler, repeating_sampler])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_batch_can_be_the_first(sampler, grouped, workers):
    arguments = {"sampler": sampler, "aspect_ratio_grouping": grouped}
    expected = list(islice(batches(**arguments), 12))
    for start in (0, 1, 7):
        later = batches(**arguments, start=start, num_workers=workers)
        assert list(islice(later, 12 - start)) == expected[start:]


def test_every_image_comes_once_an_epoch_and_never_augmented_alike():
    items = [item for batch in islice(batches(), 11) for item in batch]
    for epoch in range(3):
        assert {item[0] for item in items[11 * epoch : 11 * (epoch + 1)]} == set(range(11))
    assert [item[0] for item in items[:11]] != [item[0] for item in items[11:22]]
    for place in (1, 2, 3):
        assert len({item[place] for item in items}) == len(items)


def test_the_indices_are_those_of_detectron2s_sampler():
    found = [item[0] for batch in islice(batches(), 9) for item in batch]
    assert found == list(islice(training_sampler(5), 27))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_states_of_the_model_alone(workers):
    seed_everything(1)
    expected = draw({"id": 0})
    seed_everything(1)
    next(iter(batches(num_workers=workers)))
    assert draw({"id": 0}) == expected


def test_other_seeds_give_other_orders():
    one, other = (list(islice(batches(seed=seed), 5)) for seed in (5, 6))
    assert [[item[0] for item in b] for b in one] != [[item[0] for item in b] for b in other]
    assert {item[1] for b in one for item in b}.isdisjoint(item[1] for b in other for item in b)


def test_images_of_a_batch_are_all_wide_or_none_is():
    found = list(islice(batches(aspect_ratio_grouping=True), 40))
    kinds = Counter()
    for batch in found:
        (kind,) = {RECORDS[item[0]]["width"] > RECORDS[item[0]]["height"] for item in batch}
        kinds[kind] += 1
    assert kinds[True] and kinds[False]
    times = Counter(item[0] for batch in found for item in batch)
    assert max(times.values()) - min(times.values()) <= 2


def _collect(queue, start):
    from detectron2.utils import comm

    queue.put((comm.get_rank(), list(islice(batches(batch_size=2, start=start), 6))))


def test_processes_share_the_images_of_one():
    """Each batch of two processes has the images of one, augmented as there."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    launch(_collect, 2, args=(queue, 3), device="cpu")
    parts = dict(queue.get() for _ in range(2))
    together = list(islice(batches(batch_size=4, start=3), 6))
    for number, batch in enumerate(together):
        assert sorted(parts[0][number] + parts[1][number]) == sorted(batch)


def test_records_without_a_size_are_measured(tmp_path):
    import cv2

    for k, shape in enumerate([(4, 8), (8, 4), (4, 6), (6, 4)]):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.zeros(shape, np.uint8))
    records = [{"id": k, "file_name": str(tmp_path / f"{k}.png")} for k in range(4)]
    found = TrainingBatches(
        records,
        draw,
        lambda seed: TrainingSampler(4, seed=seed),
        batch_size=2,
        aspect_ratio_grouping=True,
    )
    for batch in islice(found, 6):
        assert {item[0] for item in batch} in ({0, 2}, {1, 3})


def test_random_states_follow_from_all_numbers_and_can_be_kept():
    seen = set()
    for numbers in ((1,), (1, 0, 1), (1, 1), (2, 1), (1, 2)):
        seed_everything(*numbers)
        seen.add((random.random(), np.random.rand(), torch.rand(()).item()))
    assert len({state[0] for state in seen}) == len({state[2] for state in seen}) == 5
    seed_everything(7)
    with same_random_state():
        draw({"id": 0})
        seed_everything(8)
    after = draw({"id": 0})
    seed_everything(7)
    assert draw({"id": 0}) == after
