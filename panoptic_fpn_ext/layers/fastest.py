"""Of several ways to one result, the one that this machine is fastest at: measured once."""

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

# A way has to be so much faster than those before it: a difference that is not noise.
MIN_GAIN = 0.05
# So many times a way is timed; but once if it takes so many times as long as another.
RUNS = 2
HOPELESS = 2

_chosen: dict[Hashable, str] = {}


def fastest(
    what: str,
    key: Hashable,
    ways: Callable[[], Mapping[str, Callable[[], Any]]],
    *,
    about: str | None = None,
) -> str:
    """The name of the fastest of some ways to do the same.

    They are measured when they are first asked for; what comes out is a fact of the machine, and
    kept for the process. Where PyTorch is to be deterministic
    (``torch.use_deterministic_algorithms``) nothing is measured: the first way is taken.

    Args:
        what: is done.
        key: all that the times depend on, but the number of threads.
        ways: makes the ways by name, the plain one first; called for measuring alone.
        about: ``what`` in more words, for a line in the log; without it there is none.
    """
    key = what, key, torch.get_num_threads()
    if key in _chosen:
        return _chosen[key]
    by_name = ways()
    if torch.are_deterministic_algorithms_enabled():
        return next(iter(by_name))
    best, least, seconds = "", math.inf, {}
    for name, way in by_name.items():
        seconds[name] = _seconds(way, least)
        if seconds[name] < least * (1 - MIN_GAIN):
            best, least = name, seconds[name]
    times = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
    if about is not None:
        logger.info("Fastest for %s on %d threads: %s (%s)", about, key[-1], best, times)
    _chosen[key] = best
    return best


def magnitude(number: int, most: int) -> int:
    """What numbers have in common that differ little: times grow alike. Above ``most``, one for
    all."""
    return min(number, most).bit_length()


def _seconds(way: Callable[[], Any], least: float) -> float:
    """The least that a way takes; ``least`` is what another does."""
    way()  # finds its memory, and what it has to measure itself
    shortest = math.inf
    for _ in range(RUNS):
        start = time.perf_counter()
        way()
        shortest = min(shortest, time.perf_counter() - start)
        if shortest > HOPELESS * least:
            break
    return shortest
