"""What several evaluators need of panoptic ground truth: each file read once, pixels as runs."""

import functools
import os
from collections.abc import Sequence

import numpy as np

from ..data.panoptic_png import read_panoptic_png


def read_ground_truth(file_name: str) -> np.ndarray:
    """As :func:`read_panoptic_png`, for evaluators that read the same file one after the other.

    Returns:
        int32 array (H, W) of segment ids, read-only. That of the last file is kept.
    """
    try:
        status = os.stat(file_name)
    except OSError:  # missing, which reading will report, or not a local file
        return read_panoptic_png(file_name)
    return _read(file_name, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read(file_name: str, _modified: int, _size: int) -> np.ndarray:
    ids = read_panoptic_png(file_name)
    ids.setflags(write=False)
    return ids


def joint_runs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of pixels, in reading order, in which neither of two maps changes.

    Segments are long runs, so that counting runs is much cheaper than counting pixels.

    Args:
        a, b: arrays of the same shape, not empty.

    Returns:
        The values of ``a``, those of ``b`` and the lengths of the runs: three arrays (N,).
    """
    a, b = a.reshape(-1), b.reshape(-1)
    change = a[1:] != a[:-1]
    change |= b[1:] != b[:-1]
    starts = np.concatenate(([0], np.flatnonzero(change) + 1))
    return a[starts], b[starts], np.diff(starts, append=a.size)


def joint_counts(a: np.ndarray, b: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How many pixels have each pair of values of two maps.

    Args:
        a, b: integer arrays of the same shape, not empty; values below ``shape[0]``, ``shape[1]``.
        shape: of the result.

    Returns:
        int64 array of that shape.
    """
    rows, columns, lengths = joint_runs(a, b)
    pairs = rows.astype(np.int64) * shape[1] + columns
    # Summed in float64, exact below 2**53.
    counts = np.bincount(pairs, weights=lengths, minlength=shape[0] * shape[1])
    return counts.astype(np.int64).reshape(shape)


def segment_places(ids: np.ndarray, segment_ids: Sequence[int]) -> np.ndarray:
    """Which of some segments, counted from 1, each pixel belongs to: int64 array; 0 is none."""
    known = np.array(segment_ids, np.int64)
    if not len(known):
        return np.zeros(ids.shape, np.int64)
    order = np.argsort(known)
    runs, _, lengths = joint_runs(ids, ids)
    found = np.minimum(np.searchsorted(known[order], runs), len(known) - 1)
    place = np.where(known[order][found] == runs, order[found] + 1, 0)
    return np.repeat(place, lengths).reshape(ids.shape)
