"""Masks of instances that are segments of one map, made only where they are needed."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes
from torchvision.ops import roi_align


class SegmentMasks(BitMasks):
    """:class:`BitMasks` of N instances that do not overlap, which takes the memory of one.

    Mask ``k`` is where ``segments == values[k]``. Selecting instances, which ROI heads do for each
    of their samples, copies no masks; :attr:`tensor` makes all of them, anew each time.
    """

    def __init__(self, segments: torch.Tensor, values: torch.Tensor) -> None:
        """
        Args:
            segments: (H, W) integers.
            values: (N,) integers, in any order; several instances may have the same.
        """
        self.segments = segments
        self.values = values
        self.image_size = segments.shape

    @property
    def tensor(self) -> torch.Tensor:
        """The masks: (N, H, W) bool."""
        return self.segments == self.values[:, None, None]

    @property
    def device(self) -> torch.device:
        return self.segments.device

    def to(self, *args: Any, **kwargs: Any) -> "SegmentMasks":
        return SegmentMasks(self.segments.to(*args, **kwargs), self.values.to(*args, **kwargs))

    def __getitem__(self, item: int | slice | torch.Tensor) -> "SegmentMasks":
        return SegmentMasks(self.segments, self.values[item].reshape(-1))

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self)})"

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """As :meth:`BitMasks.crop_and_resize`, equal to the last bit, one segment at a time.

        Args:
            boxes: (N, 4), x0, y0, x1, y1; one for each mask.
            mask_size: height and width of the result.

        Returns:
            (N, mask_size, mask_size) bool.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} masks")
        crops = torch.zeros(len(self), mask_size, mask_size, dtype=torch.bool, device=self.device)
        if not len(self):
            return crops
        values, order = self.values.sort()
        values, counts = values.unique_consecutive(return_counts=True)
        boxes = boxes.to(self.device, torch.float32)[order]
        mask = torch.empty(self.segments.shape, device=self.device)  # of one segment at a time
        crops_of_segments = []
        for value, of_segment in zip(values, boxes.split(counts.tolist()), strict=True):
            torch.eq(self.segments, value, out=mask)
            crops_of_segments.append(
                roi_align(mask[None, None], [of_segment], mask_size, sampling_ratio=0, aligned=True)
            )
        crops[order] = torch.cat(crops_of_segments).squeeze(1) >= 0.5
        return crops

    def get_bounding_boxes(self) -> Boxes:
        return BitMasks(self.tensor).get_bounding_boxes()

    @staticmethod
    def cat(bitmasks_list: Sequence[BitMasks]) -> BitMasks:
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list]))
