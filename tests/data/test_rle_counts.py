"""Counts of run-length encodings against pycocotools and a naive reader."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_util

from panoptic_fpn_ext.data.rle_counts import counts_fault

MASKS = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda size: arrays(bool, size))


def runs_of(mask: np.ndarray) -> list[int]:
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@settings(deadline=None)
@given(MASKS)
def test_what_pycocotools_encodes_is_right(mask):
    compressed = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    for counts in (compressed, compressed.decode(), runs_of(mask)):
        assert counts_fault(counts, mask.size) is None
        assert f"sum is {mask.size}, expected {mask.size + 1}" in counts_fault(
            counts, mask.size + 1
        )


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=12))
def test_long_runs_are_summed(runs):
    size = [sum(runs), 1]
    compressed = mask_util.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
    assert counts_fault(compressed, sum(runs)) is None


def naive_sum(counts: str) -> int | None:
    """As ``rleFrString``, with a look at where the string ends."""
    runs, place = [], 0
    while place < len(counts):
        number, digits, more = 0, 0, True
        while more:
            if place == len(counts):
                return None
            value = ord(counts[place]) - 48
            if not 0 <= value < 64:
                return None
            number |= (value & 31) << (5 * digits)
            more = value & 32
            digits += 1
            place += 1
            if not more and value & 16:
                number -= 1 << (5 * digits)
        if len(runs) > 2:
            number += runs[-2]
        runs.append(number)
    return None if any(run < 0 for run in runs) else sum(runs)


@settings(deadline=None, max_examples=500)
@given(st.text(st.characters(min_codepoint=45, max_codepoint=115), max_size=8))
def test_any_string_is_summed_or_told(counts):
    total = naive_sum(counts)
    if total is None:
        assert counts_fault(counts, 10)
    else:
        assert counts_fault(counts, total) is None
        assert counts_fault(counts, total + 1)


@pytest.mark.parametrize(
    "counts",
    [None, 5, [5, -1, 96], [50.0, 50.0], [True, 99], ["100"], {}, "b'PP1'", "é", "P" * 40, [99]],
)
def test_what_is_no_encoding_is_told(counts):
    assert counts_fault(counts, 100)
