"""Ground truth of both branches from one panoptic map.

A map of segment ids goes through every geometric transform as an image of small indices, exactly
as Detectron2 transforms a semantic map; the targets are then read off it. Nothing is converted
beforehand.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import TransformList
from detectron2.structures import BitMasks, Boxes, Instances

from ..errors import UserError

MAX_SEGMENTS = 254  # one byte, without 0 and 255, with which Detectron2's transforms pad


def index_segments(
    ids: np.ndarray, segments_info: Sequence[dict[str, Any]], *, source: str
) -> np.ndarray:
    """Replace the segment ids of a panoptic PNG with the segments' places in ``segments_info``.

    Args:
        ids: (H, W) integers; 0 is void.
        segments_info: the segments of the image.
        source: the PNG's name, for errors.

    Returns:
        (H, W) uint8: 0 for void, k + 1 for ``segments_info[k]``.

    Raises:
        UserError: an id in the map that ``segments_info`` lacks, or too many segments.
    """
    if len(segments_info) > MAX_SEGMENTS:
        raise UserError(
            f"{source}: {len(segments_info)} segments, at most {MAX_SEGMENTS} are supported"
        )
    found, index = np.unique(ids, return_inverse=True)
    place = {info["id"]: k + 1 for k, info in enumerate(segments_info)} | {0: 0}
    missing = [int(i) for i in found if int(i) not in place]
    if missing:
        raise UserError(f"{source}: segment id {missing[0]} is not in segments_info")
    table = np.array([place[int(i)] for i in found], dtype=np.uint8)
    return table[index.reshape(ids.shape)]


def sem_seg_from_index(
    index: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    *,
    thing_sem_seg_ids: Sequence[int],
    ignore_label: int,
) -> np.ndarray:
    """The semantic map of an index map of :func:`index_segments`.

    Crowds have their category's semantic class; only void is ignored.

    Args:
        index: (H, W) uint8.
        segments_info: the segments, category ids contiguous.
        thing_sem_seg_ids: the semantic class of each thing category.
        ignore_label: the value of void pixels.

    Returns:
        (H, W) uint8.
    """
    table = np.full(256, ignore_label, dtype=np.uint8)
    for k, info in enumerate(segments_info):
        category = info["category_id"]
        table[k + 1] = thing_sem_seg_ids[category] if info["isthing"] else category
    return table[index]


def sem_seg_from_panoptic(
    ids: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    *,
    thing_sem_seg_ids: Sequence[int],
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


def instances_from_index(index: np.ndarray, segments_info: Sequence[dict[str, Any]]) -> Instances:
    """The instances of an index map of :func:`index_segments`: things that are no crowds.

    Args:
        index: (H, W) uint8, transformed as the image is.
        segments_info: the segments, category ids contiguous.

    Returns:
        Instances with ``gt_classes``, ``gt_masks`` (BitMasks) and ``gt_boxes``, tight around the
        masks; one for each segment that still has a pixel.
    """
    pixels = np.bincount(index.ravel(), minlength=256)
    kept = [
        (k + 1, info["category_id"])
        for k, info in enumerate(segments_info)
        if info["isthing"] and not info.get("iscrowd", 0) and pixels[k + 1]
    ]
    masks = index == np.array([k for k, _ in kept], dtype=np.uint8)[:, None, None]
    instances = Instances(index.shape)
    instances.gt_classes = torch.tensor([c for _, c in kept], dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = tight_boxes(masks)
    return instances


def tight_boxes(masks: np.ndarray) -> Boxes:
    """The boxes (x0, y0, x1, y1), pixel edges, around masks (N, H, W), none of them empty."""

    def ends(hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return hits.argmax(axis=1), hits.shape[1] - hits[:, ::-1].argmax(axis=1)

    x0, x1 = ends(masks.any(axis=1))
    y0, y1 = ends(masks.any(axis=2))
    return Boxes(torch.from_numpy(np.stack([x0, y0, x1, y1], axis=1).astype(np.float32)))


def transform_index(index: np.ndarray, transforms: TransformList) -> np.ndarray:
    """Apply the transforms of an image to its index map; what comes in from outside is void."""
    index = transforms.apply_segmentation(index)
    # Detectron2 pads semantic maps with 0 or 255; both are void.
    return np.where(index == 255, 0, index).astype(np.uint8)
