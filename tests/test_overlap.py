"""Reading, predicting and finishing at the same time: order, bounds and errors."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from panoptic_fpn_ext.overlap import AHEAD, overlapped


def numbers(taken: list[int], end: int) -> Iterator[int]:
    for k in range(end):
        taken.append(k)
        yield k


@pytest.mark.parametrize("number", [0, 1, AHEAD, 50])
def test_all_come_in_order(number) -> None:
    def finish(item: int, output: int) -> tuple[int, int]:
        time.sleep(0.002 * (item % 3))
        return item, output

    found = list(overlapped(numbers([], number), lambda k: k * k, finish))
    assert found == [(k, k * k) for k in range(number)]


def test_one_is_finished_after_the_other() -> None:
    """As frames of a video have to be."""
    said: list[tuple[str, int]] = []

    def finish(k: int, _: int) -> None:
        said.append(("begins", k))
        time.sleep(0.01 if k % 2 == 0 else 0)
        said.append(("ends", k))

    list(overlapped(numbers([], 8), lambda k: k, finish))
    assert said == [(what, k) for k in range(8) for what in ("begins", "ends")]


def test_what_waits_is_left_out_after_an_error() -> None:
    finished: list[int] = []

    def predict(k: int) -> int:
        if k == AHEAD:
            raise KeyboardInterrupt
        return k

    def finish(k: int, _: int) -> None:
        time.sleep(0.1)
        finished.append(k)

    with pytest.raises(KeyboardInterrupt):
        list(overlapped(numbers([], 100), predict, finish))
    assert len(finished) < AHEAD


def test_the_three_run_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def read() -> Iterator[int]:
        for k in range(6):
            if k == 5:
                together.wait()
            yield k

    def predict(k: int) -> int:
        if k == 1:
            together.wait()
        return k

    def finish(k: int, _: int) -> int:
        if k == 0:
            together.wait()
        return k

    assert list(overlapped(read(), predict, finish)) == list(range(6))


def test_little_is_in_memory() -> None:
    taken: list[int] = []
    predicted: list[int] = []
    go_on = threading.Event()

    def predict(k: int) -> int:
        predicted.append(k)
        if k == AHEAD:
            go_on.set()
        return k

    def finish(k: int, _: int) -> int:
        assert go_on.wait(10)
        return k

    results = overlapped(numbers(taken, 1000), predict, finish)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(predicted) <= AHEAD + 1 and len(taken) <= 2 * AHEAD + 1
    results.close()


@pytest.mark.parametrize("where", ["read", "predict", "finish"])
def test_an_error_is_raised_and_no_thread_stays(where) -> None:
    before = threading.active_count()

    def fail(place: str, k: int) -> int:
        if place == where and k == 7:
            raise ZeroDivisionError
        return k

    found: list[int] = []
    with (
        pytest.raises(ZeroDivisionError),
        closing(
            overlapped(
                (fail("read", k) for k in range(100)),
                lambda k: fail("predict", k),
                lambda k, _: fail("finish", k),
            )
        ) as results,
    ):
        for k in results:
            found.append(k)
    assert found == list(range(len(found))) and len(found) <= 7
    assert threading.active_count() == before
