"""Boundary PQ (https://arxiv.org/abs/2103.16562): PQ with the IoU of inner borders, too."""

import cv2
import numpy as np

from .panoptic_maps import joint_counts, segment_places
from .panoptic_matching import SegmentTable

WIDTH = 0.02  # of a border, as a share of the image's diagonal; the paper's


def border(numbers: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels at most that far, in steps to any of 8 neighbours, from another segment.

    What is beyond the image counts as another segment.

    Args:
        numbers: (H, W) integers below 2**16, which segment each pixel belongs to.
    """
    width = max(1, round(WIDTH * float(np.hypot(*numbers.shape))))
    padded = np.pad(numbers.astype(np.uint16), width, constant_values=2**16 - 1)
    most = least = padded
    for shape in ((2 * width + 1, 1), (1, 2 * width + 1)):  # a square, many times faster
        kernel = np.ones(shape, np.uint8)
        most, least = cv2.dilate(most, kernel), cv2.erode(least, kernel)
    changes = most != least
    return changes[width:-width, width:-width]


def boundary_iou(table: SegmentTable, gt_ids: np.ndarray, pred_ids: np.ndarray) -> np.ndarray:
    """The lesser of IoU and boundary IoU of each true and predicted segment: float64 array (G, P).

    Args:
        table: the segments and how they overlap.
        gt_ids, pred_ids: the maps that it was counted in, (H, W).
    """
    gt = segment_places(gt_ids, [s["id"] for s in table.gt_segments])
    pred = segment_places(pred_ids, [s["id"] for s in table.pred_segments])
    gt_border, pred_border = border(gt), border(pred)
    shape = len(table.gt_segments) + 1, len(table.pred_segments) + 1
    gt_area = np.bincount(gt[gt_border], minlength=shape[0])
    # Void is no part of a union here either.
    pred_area = np.bincount(pred[pred_border & (gt > 0)], minlength=shape[1])
    common = joint_counts(np.where(gt_border & pred_border, gt, 0), pred, shape)[1:, 1:]
    union = gt_area[1:, None] + pred_area[1:] - common
    with np.errstate(invalid="ignore"):
        of_borders = np.where(union > 0, common / np.maximum(union, 1), 0.0)
        of_masks = np.where(table.union > 0, table.intersection / np.maximum(table.union, 1), 0.0)
    return np.minimum(of_borders, of_masks)
