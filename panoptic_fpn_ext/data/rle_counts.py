"""What is wrong with the counts of a run-length encoding; pycocotools does not look."""

from typing import Any

import numpy as np

FIRST, LAST = ord("0"), ord("0") + 63  # the characters of a compressed encoding: six bits each
MORE, NEGATIVE = 32, 16


def counts_fault(counts: Any, pixels: int) -> str | None:
    """Why the counts of a mask cannot be decoded, in words; None if they can.

    Args:
        counts: a list of the lengths of runs, or, compressed, a string or bytes
            (https://github.com/cocodataset/cocoapi, ``maskApi.c``, ``rleToString``).
        pixels: of the mask, the sum of its runs.
    """
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            return "counts that are not all integers from 0"
        total = sum(counts)
    elif isinstance(counts, (str, bytes)):
        runs = _decompressed(counts)
        if runs is None:
            return "counts that are cut off or no compressed run lengths"
        if len(runs) and runs.min() < 0:
            return "negative counts"
        total = int(runs.sum())
    else:
        return f"counts of type {type(counts).__name__}, expected a list or a string"
    return None if total == pixels else f"counts whose sum is {total}, expected {pixels}, H x W"


def _decompressed(counts: str | bytes) -> np.ndarray | None:
    """The lengths of the runs; None if there are none in it."""
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        return None
    values = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - FIRST
    if not len(values):
        return values
    if values.min() < 0 or values.max() > LAST - FIRST or values[-1] & MORE:
        return None
    ends = np.flatnonzero(~values & MORE)
    starts = np.concatenate(([0], ends[:-1] + 1))
    places = np.arange(len(values)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 10:  # more than a number has
        return None
    numbers = np.add.reduceat((values & 31) << (5 * places), starts)
    numbers -= np.where(values[ends] & NEGATIVE, np.int64(1) << (5 * (ends - starts + 1)), 0)
    # From the fourth on they are differences to the number two before.
    for parity in (1, 2):
        numbers[parity::2] = numbers[parity::2].cumsum()
    return numbers
