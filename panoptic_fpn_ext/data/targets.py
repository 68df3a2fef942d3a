"""Ground truth of both branches from one panoptic map.

A map of segment ids goes through every geometric transform as an image of small indices, exactly
as Detectron2 transforms a semantic map; the targets are then read off it. Nothing is converted
beforehand. Segments are long runs of equal pixels, so work is done on runs where it can be, not on
pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data.transforms import Transform, TransformList
from detectron2.structures import Boxes, Instances

from ..errors import UserError
from .panoptic_png import hint_of_swapped_bytes
from .segment_masks import SegmentMasks

MAX_SEGMENTS = 2**16 - 2  # two bytes, without 0 and the greatest, with which transforms pad


class SegmentBoxes(NamedTuple):
    """The values of a map, ascending; how many pixels each has, and the tight box around them.

    ``values`` (N,), ``areas`` (N,) and ``boxes`` (N, 4): x0, y0, x1, y1, pixel edges.
    """

    values: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray


def segment_boxes(segments: np.ndarray) -> SegmentBoxes:
    """Area and box of every value of an integer map (H, W)."""
    width = segments.shape[1]
    flat = np.ascontiguousarray(segments).reshape(-1)
    begins = np.empty(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[::width] = True  # a run ends with its row
    starts = np.flatnonzero(begins)
    order = np.argsort(flat[starts], kind="stable")
    lengths = np.diff(starts, append=flat.size)[order]
    starts = starts[order]
    values = flat[starts]
    groups = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    y, x = np.divmod(starts, width)
    boxes = [
        np.minimum.reduceat(x, groups),
        np.minimum.reduceat(y, groups),
        np.maximum.reduceat(x + lengths, groups),
        np.maximum.reduceat(y, groups) + 1,
    ]
    return SegmentBoxes(values[groups], np.add.reduceat(lengths, groups), np.stack(boxes, axis=1))


def index_segments(
    ids: np.ndarray, segments_info: Sequence[dict[str, Any]], *, source: str
) -> np.ndarray:
    """Replace the segment ids of a panoptic PNG with the segments' positions in ``segments_info``.

    Args:
        ids: (H, W) integers; 0 is void.
        segments_info: the segments of the image.
        source: the PNG's name, for errors.

    Returns:
        (H, W): 0 for void, k + 1 for ``segments_info[k]``; uint8, or uint16 for more than 254
        segments. After transforms the greatest value of the type is void too.

    Raises:
        UserError: an id in the map that ``segments_info`` lacks, or too many segments.
    """
    if len(segments_info) > MAX_SEGMENTS:
        raise UserError(
            f"{source}: {len(segments_info)} segments, at most {MAX_SEGMENTS} are supported"
        )
    known = np.array([0, *(info["id"] for info in segments_info)])
    order = np.argsort(known, kind="stable")
    flat = ids.reshape(-1)
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    values = flat[starts]
    positions = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    missing = values[known[positions] != values]
    if len(missing):
        hint = hint_of_swapped_bytes(missing.tolist(), known.tolist())
        raise UserError(
            f"{source}: segment id {missing.min()} is not in segments_info of the panoptic JSON"
            f"{hint}; tools/check_dataset.py lists all faults of a dataset"
        )
    dtype = np.uint8 if len(segments_info) < 255 else np.uint16
    return np.repeat(positions.astype(dtype), np.diff(starts, append=flat.size)).reshape(ids.shape)


def transform_index(index: np.ndarray, transforms: Transform | TransformList) -> np.ndarray:
    """Apply the transforms of an image to its index map.

    What comes in from outside the image, which Detectron2 fills with 0 or 255, is void. The result
    is contiguous: a flip is a view, which every reader would have to copy.
    """
    if index.dtype == np.uint8:
        return np.ascontiguousarray(transforms.apply_segmentation(index))
    # Detectron2's transforms take bytes; both halves go through the same ones.
    low, high = (
        transforms.apply_segmentation(part.astype(np.uint8)) for part in (index & 255, index >> 8)
    )
    return low + (high.astype(np.uint16) << 8)


def sem_seg_from_index(
    index: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    *,
    thing_sem_seg_ids: Mapping[int, int],
    ignore_label: int,
) -> np.ndarray:
    """The semantic map of an index map of :func:`index_segments`.

    Crowds have their category's semantic class; only void is ignored.

    Args:
        index: (H, W), uint8 or uint16.
        segments_info: the segments, category ids contiguous.
        thing_sem_seg_ids: thing category -> semantic class.
        ignore_label: the value of void pixels.

    Returns:
        (H, W) uint8.
    """
    table = np.full(np.iinfo(index.dtype).max + 1, ignore_label, dtype=np.uint8)
    for k, info in enumerate(segments_info):
        category = info["category_id"]
        table[k + 1] = thing_sem_seg_ids[category] if info["isthing"] else category
    return cv2.LUT(index, table) if index.dtype == np.uint8 else table[index]


def sem_seg_from_panoptic(
    ids: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    *,
    thing_sem_seg_ids: Mapping[int, int],
    ignore_label: int,
    source: str = "panoptic map",
) -> np.ndarray:
    """The semantic map of a map of segment ids, (H, W) uint8."""
    return sem_seg_from_index(
        index_segments(ids, segments_info, source=source),
        segments_info,
        thing_sem_seg_ids=thing_sem_seg_ids,
        ignore_label=ignore_label,
    )


def instance_values(segments_info: Sequence[dict[str, Any]]) -> list[int]:
    """The values of an index map that are instances: things that are not crowds."""
    return [
        k + 1
        for k, info in enumerate(segments_info)
        if info["isthing"] and not info.get("iscrowd", 0)
    ]


def instances_from_index(
    index: np.ndarray, segments_info: Sequence[dict[str, Any]], *, with_masks: bool = True
) -> Instances:
    """The instances of an index map of :func:`index_segments`: things that are not crowds.

    Args:
        index: (H, W), uint8 or uint16, transformed as the image is.
        segments_info: the segments, category ids contiguous.
        with_masks: whether to make ``gt_masks``.

    Returns:
        Instances with ``gt_classes``, ``gt_boxes``, tight around the masks, and ``gt_masks``
        (SegmentMasks, which are BitMasks); one for each segment that still has a pixel.
    """
    segments = segment_boxes(index)
    is_instance = np.isin(segments.values, instance_values(segments_info))
    values = segments.values[is_instance]
    instances = Instances(index.shape)
    instances.gt_boxes = Boxes(torch.from_numpy(segments.boxes[is_instance].astype(np.float32)))
    instances.gt_classes = torch.tensor(
        [segments_info[value - 1]["category_id"] for value in values.tolist()], dtype=torch.int64
    )
    if with_masks:
        # PyTorch does not compute with uint16, nor take flipped or read-only arrays.
        dtype = np.uint8 if index.dtype == np.uint8 else np.int32
        index = np.require(index, dtype, ["C", "W"])
        instances.gt_masks = SegmentMasks(
            torch.from_numpy(index), torch.from_numpy(values.astype(dtype))
        )
    return instances
