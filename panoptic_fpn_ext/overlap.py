"""Reading, predicting and drawing at the same time."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

AHEAD = 4  # items that are there before they are needed, and that wait to be finished

Item = TypeVar("Item")
Output = TypeVar("Output")
Result = TypeVar("Result")


def overlapped(
    items: Iterator[Item],
    predict: Callable[[Item], Output],
    finish: Callable[[Item, Output], Result],
) -> Generator[Result, None, None]:
    """Take items, predict and finish at the same time: a thread each for the first and the last.

    All is done in the order of the items, and :data:`AHEAD` of them at most wait at either place.
    What a thread raises is raised here, and nothing is left running.

    Yields:
        What ``finish`` returns.
    """
    end: Any = object()
    with _one_thread() as reading, _one_thread() as finishing:
        read = deque(reading.submit(next, items, end) for _ in range(AHEAD))
        finished: deque[Future[Result]] = deque()
        while (item := read.popleft().result()) is not end:
            read.append(reading.submit(next, items, end))
            finished.append(finishing.submit(finish, item, predict(item)))
            while finished and (len(finished) > AHEAD or finished[0].done()):
                yield finished.popleft().result()
        while finished:
            yield finished.popleft().result()


@contextmanager
def _one_thread() -> Iterator[ThreadPoolExecutor]:
    """One that does what is submitted in turn; at the end what has not begun is left out."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
