"""Run-length encoding against pycocotools."""

import numpy as np
import pycocotools.mask as mask_util
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from panoptic_fpn_ext.evaluation.rle import encode_masks


def reference(masks: np.ndarray) -> list[dict]:
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    return mask_util.encode(columns) if len(masks) else []


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(
        bool,
        st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7)),
        elements=st.booleans(),
        fill=st.booleans(),
    )
)
def test_equals_pycocotools(masks):
    assert encode_masks(masks) == reference(masks)


def test_large_masks_equal_pycocotools():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 300, 200), bool)
    masks[0, 40:290, 30:] = rng.random((250, 170)) < 0.9
    masks[1, :, 20:40] = True  # columns that touch
    masks[2] = True
    assert encode_masks(masks) == reference(masks)
