"""The batches of a training, any of which can be the first: a run goes on exactly where it was.

Nothing is remembered from one batch to the next. Which images are in a batch follows from a seed
and the number of the batch; how an image is augmented, from the seed and its place in their order.
"""

import functools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .watched_records import WatchedRecords

Place = tuple[int, int]
"""The index of a record, and its place in the order of the records of all processes."""


def seed_everything(*numbers: int) -> None:
    """Set the random states of Python, NumPy and PyTorch by some numbers from 0."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave the random states of Python, NumPy and PyTorch, on CPUs, as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class TrainingBatches:
    """An endless iterable of lists of mapped records, those of this process.

    ``start`` is the batch to begin with, ``seed`` what their order follows from, the same in all
    processes; both may be set until the first batch is asked for.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        make_sampler: Callable[[int], Iterable[int]],
        *,
        batch_size: int,
        aspect_ratio_grouping: bool = False,
        num_workers: int = 0,
        names: Sequence[str] = (),
        seed: int = 0,
        start: int = 0,
    ) -> None:
        """
        Args:
            records: dataset dicts.
            mapper: makes the model's input of a record.
            make_sampler: from a seed to the indices of this process's records, endless, as one of
                Detectron2's samplers for training.
            batch_size: images of a batch, of this process.
            aspect_ratio_grouping: whether the images of a batch are all wide or all high.
            num_workers: processes that load.
            names: of the datasets that the records are of, for errors.
            seed, start: see above.
        """
        self._mapped = WatchedRecords(records, mapper, names=names, num_workers=num_workers)
        self._make_sampler = make_sampler
        self._batch_size = batch_size
        self._aspect_ratio_grouping = aspect_ratio_grouping
        self._num_workers = num_workers
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        places = self._places()
        if self._aspect_ratio_grouping:
            places = _grouped(places, self._batch_size, functools.cache(self._is_wide))
        loader = DataLoader(
            _Seeded(self._mapped, self.seed),
            sampler=_Once(islice(places, self.start * self._batch_size, None)),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_itself,
            worker_init_fn=functools.partial(_leave_signals, os.getpid()),
        )
        with same_random_state():  # it draws a seed
            images = iter(loader)
        while True:
            yield list(islice(images, self._batch_size))

    def _places(self) -> Iterator[Place]:
        """The records of this process in their order, without end."""
        rank, processes = comm.get_rank(), comm.get_world_size()
        for number, index in enumerate(self._make_sampler(self.seed)):
            yield int(index), number * processes + rank

    def _is_wide(self, index: int) -> bool:
        record = self._mapped.records[index]
        if "width" in record:
            return record["width"] > record["height"]
        # Records of Detectron2's own panoptic datasets do not say.
        with PathManager.open(record["file_name"], "rb") as file, Image.open(file) as image:
            return image.width > image.height


def _grouped(
    places: Iterable[Place], batch_size: int, is_wide: Callable[[int], bool]
) -> Iterator[Place]:
    """The places in an order in which each ``batch_size`` of them are all wide, or none is."""
    groups: dict[bool, list[Place]] = {True: [], False: []}
    for place in places:
        group = groups[is_wide(place[0])]
        group.append(place)
        if len(group) == batch_size:
            yield from group
            group.clear()


class _Seeded(Dataset):
    """A dataset whose items depend on nothing but their place."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, place: Place) -> Any:
        index, number = place
        with same_random_state():  # in the process that trains, the model's
            seed_everything(self._seed, number)
            return self._dataset[index]


class _Once:
    """A sampler out of an iterator."""

    def __init__(self, iterator: Iterator[Place]) -> None:
        self._iterator = iterator

    def __iter__(self) -> Iterator[Place]:
        return self._iterator


def _leave_signals(main_process: int, _: int) -> None:
    """What stops a training stops its main process, which needs this one until it says so."""
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while signal.sigwaitinfo(signals).si_pid != main_process:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _itself(item: Any) -> Any:
    return item
