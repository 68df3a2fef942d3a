"""Reading once, and runs of pixels."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from panoptic_fpn_ext.data.panoptic_png import write_panoptic_png
from panoptic_fpn_ext.errors import UserError
from panoptic_fpn_ext.evaluation.panoptic_maps import joint_runs, read_ground_truth


def test_a_file_is_read_again_only_when_it_changes(tmp_path):
    path = str(tmp_path / "a.png")
    write_panoptic_png(path, np.full((2, 3), 7))
    first = read_ground_truth(path)
    assert read_ground_truth(path) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    write_panoptic_png(path, np.full((2, 3), 8))
    os.utime(path, ns=(0, 0))
    assert (read_ground_truth(path) == 8).all()
    write_panoptic_png(path, np.arange(600).reshape(20, 30))
    os.utime(path, ns=(0, 0))
    assert read_ground_truth(path).shape == (20, 30)
    os.remove(path)
    with pytest.raises(UserError, match=r"a\.png"):
        read_ground_truth(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_runs_are_the_pixels(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6))
    a, b = (data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 2))) for _ in range(2))
    a_values, b_values, lengths = joint_runs(a, b)
    assert np.array_equal(np.repeat(a_values, lengths), a.reshape(-1))
    assert np.array_equal(np.repeat(b_values, lengths), b.reshape(-1))
    assert ((a_values[1:] != a_values[:-1]) | (b_values[1:] != b_values[:-1])).all()
