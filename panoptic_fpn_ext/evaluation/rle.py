"""Run-length encoding of binary masks, in the format of pycocotools."""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """What ``pycocotools.mask.encode`` gives, many times faster where objects are small.

    Only the box around each object is brought into the column order of the format.

    Args:
        masks: bool array (N, H, W).

    Returns:
        For each mask ``size``, [H, W], and ``counts``, bytes.
    """
    height, width = masks.shape[1:]
    runs = [
        {"size": [height, width], "counts": _counts(mask, rows)}
        for mask, rows in zip(masks, masks.any(axis=2), strict=True)
    ]
    return mask_util.frPyObjects(runs, height, width) if runs else []


def _counts(mask: np.ndarray, rows: np.ndarray) -> list[int]:
    """Lengths of the runs of background and object by turns, column by column."""
    height = mask.shape[0]
    positions = np.empty(0, dtype=np.int64)
    hit_rows = np.flatnonzero(rows)
    if len(hit_rows):
        top, bottom = hit_rows[0], hit_rows[-1] + 1
        hit_columns = np.flatnonzero(mask[top:bottom].any(axis=0))
        left, right = hit_columns[0], hit_columns[-1] + 1
        # One pixel of background below each column of the box ends the column's last run.
        columns = np.zeros((right - left, bottom - top + 1), dtype=bool)
        columns[:, :-1] = mask[top:bottom, left:right].T
        flat = columns.reshape(-1)
        changes = np.flatnonzero(np.concatenate((flat[:1], flat[1:] != flat[:-1])))
        column, row = np.divmod(changes, columns.shape[1])
        positions = (left + column) * height + top + row
        # A run to the bottom of the image and one from the top of the next column are one run.
        joint = np.append(positions[1:] == positions[:-1], False)
        joint[1:] |= joint[:-1]
        positions = positions[~joint & (positions < mask.size)]
    return np.diff(positions, prepend=0, append=mask.size).tolist()
