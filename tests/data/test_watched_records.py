"""Whatever happens to a process that loads, the error says at which record of which dataset."""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import pytest
from detectron2.data.samplers import TrainingSampler
from torch.utils.data import DataLoader

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.training_batches import TrainingBatches
from panoptic_fpn_ext.data.watched_records import WatchedRecords, deaths_are_named, is_death

pytestmark = pytest.mark.faults

RECORDS = [{"file_name": f"images/{k}.jpg", "place": k} for k in range(8)]
BAD = 5


def segfault() -> None:
    ctypes.string_at(0)


DEATHS: dict[str, tuple[Callable[[], None], str]] = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"signal: Killed; .*out of memory"),
    "segfault": (segfault, r"signal: Segmentation fault; .*NUM_WORKERS 0"),
    "bus error": (lambda: os.kill(os.getpid(), signal.SIGBUS), r"signal: Bus error; .*/dev/shm"),
    "exit 3": (lambda: os._exit(3), r"exited unexpectedly with exit code 3; .*NUM_WORKERS 0"),
}


class Dies:
    """A mapper that ends its process at a record; others take a while beside it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, record: dict) -> int:
        if record["place"] == BAD:
            time.sleep(0.05)  # the other processes are at others
            DEATHS[self.how][0]()
        time.sleep(0.1)
        return record["place"]


def fails(record: dict) -> dict:
    if record["place"] == BAD:
        raise ValueError("two\nlines")
    if record["place"] == BAD + 1:
        raise UserError(f"{record['file_name']}: a line")
    return record


def itself(item: object) -> object:
    return item


@contextmanager
def loading(mapper: Callable, num_workers: int) -> Iterator[Iterator]:
    """An iterator over the mapped records."""
    records = WatchedRecords(RECORDS, mapper, names=("streets",), num_workers=num_workers)
    loader = DataLoader(records, batch_size=None, num_workers=num_workers, collate_fn=itself)
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        if num_workers:  # the garbage collector takes 5 seconds for each process
            iterator._shutdown_workers()


@pytest.mark.parametrize("how", DEATHS)
def test_a_death_names_the_record(how):
    with (
        pytest.raises(
            UserError, match=rf"^dataset streets: images/{BAD}\.jpg: .* {DEATHS[how][1]}"
        ) as error,
        deaths_are_named(),
        loading(Dies(how), 3 if how == "killed" else 1) as items,
    ):
        list(items)
    assert "\n" not in str(error.value)
    assert is_death(error.value.__cause__) and not is_death(error.value)


def test_a_death_in_a_training_names_the_record():
    def sampler(seed: int) -> TrainingSampler:
        return TrainingSampler(len(RECORDS), shuffle=False)

    batches = TrainingBatches(
        RECORDS, Dies("killed"), sampler, batch_size=2, num_workers=2, names=("a", "b")
    )
    message = rf"^dataset a or b: images/{BAD}\.jpg: .*: Killed;"
    with pytest.raises(UserError, match=message), deaths_are_named():
        list(islice(batches, 100))


def test_a_process_killed_while_it_waits_is_at_no_image():
    """As the one that fills the memory last need not be the one that is killed."""
    with (
        pytest.raises(UserError, match=r"^dataset streets: between two images: .*signal: Killed"),
        deaths_are_named(),
        loading(fails, 1) as items,
    ):
        next(items)
        time.sleep(0.3)  # it has loaded ahead, and waits
        (process,) = items._workers
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(10)  # the error comes into whatever is going on


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_names_the_record(num_workers, caplog):
    message = rf"^dataset streets: images/{BAD}\.jpg: ValueError: two lines$"
    with pytest.raises(UserError, match=message), loading(fails, num_workers) as items:
        list(items)
    if num_workers == 0:  # the log of the others is theirs
        (entry,) = caplog.records
        assert entry.exc_info[0] is ValueError and entry.levelno == logging.ERROR


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_line_that_names_the_file_is_kept(num_workers, caplog):
    with loading(fails, num_workers) as items:
        assert [next(items)["place"] for _ in range(BAD)] == list(range(BAD))
        with pytest.raises(UserError):
            next(items)
        caplog.clear()
        with pytest.raises(UserError, match=rf"^dataset streets: images/{BAD + 1}\.jpg: a line$"):
            next(items)
        assert not caplog.records


def test_records_without_a_file_name_have_a_number():
    records = [{"place": BAD, "image_id": "x7"}, {"place": BAD}]
    watched = WatchedRecords(records, fails)
    with pytest.raises(UserError, match=r"^image x7: ValueError"):
        watched[0]
    with pytest.raises(UserError, match=r"^image 1: ValueError"):
        watched[1]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("DataLoader worker")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error), match=str(error)) as raised, deaths_are_named():
        raise error
    assert raised.value is error


def test_a_process_of_another_loader_is_no_riddle():
    message = "DataLoader worker (pid(s) 1, 2) exited unexpectedly"
    with (
        pytest.raises(
            UserError, match=r"^loading images: the process that was loading exited unexpectedly; "
        ),
        deaths_are_named(),
    ):
        raise RuntimeError(message)
