"""What training does to an image and its ground truth: resizing, cropping, flips, colours."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..errors import UserError
from .targets import segment_boxes, transform_index

CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


class PanopticAugInput(T.AugInput):
    """An image and the index map of its segments, for augmentations that look at both."""

    def __init__(self, image: np.ndarray, *, index: np.ndarray, instance_values: list[int]) -> None:
        """
        Args:
            image: (H, W, C) uint8.
            index: (H, W), see :func:`~panoptic_fpn_ext.data.targets.index_segments`.
            instance_values: the values of ``index`` that are instances.
        """
        super().__init__(image)
        self.index = index
        self.instance_values = instance_values

    def transform(self, tfm: T.Transform) -> None:
        super().transform(tfm)
        self.index = transform_index(self.index, tfm)


class RandomCropHoldingInstance(T.RandomCrop):
    """Detectron2's random crop, drawn so that it contains an instance, if the image has one.

    It contains the whole of a random instance, or, along an axis in which that is larger than the
    crop, a part; always at least one of its pixels.
    """

    def __init__(self, crop_type: str, crop_size: tuple[float, float], probability: float) -> None:
        """
        Args:
            crop_type, crop_size: see :class:`detectron2.data.transforms.RandomCrop`.
            probability: how often to look for an instance; the other crops are drawn blindly.
        """
        super().__init__(crop_type, crop_size)
        self.probability = probability

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        if not isinstance(aug_input, PanopticAugInput) or np.random.rand() >= self.probability:
            return super().__call__(aug_input)
        crop = self._crop_with_instance(aug_input.index, aug_input.instance_values)
        if crop is None:
            return super().__call__(aug_input)
        aug_input.transform(crop)
        return crop

    def _crop_with_instance(
        self, index: np.ndarray, instance_values: list[int]
    ) -> T.Transform | None:
        """A crop that contains an instance of an index map (H, W); None if there is none."""
        segments = segment_boxes(index)
        candidates = np.flatnonzero(np.isin(segments.values, instance_values))
        if not len(candidates):
            return None
        chosen = np.random.choice(candidates)
        x0, y0, x1, y1 = segments.boxes[chosen].tolist()
        pixels = np.argwhere(index[y0:y1, x0:x1] == segments.values[chosen])
        y, x = (pixels[np.random.randint(len(pixels))] + (y0, x0)).tolist()
        height, width = self.get_crop_size(index.shape)
        top = _start(y0, y1, y, height, index.shape[0])
        left = _start(x0, x1, x, width, index.shape[1])
        return T.CropTransform(left, top, width, height)


def _start(low: int, high: int, pixel: int, size: int, limit: int) -> int:
    """A random start of a crop along an axis.

    Args:
        low, high: what the crop is to contain; if it is larger than the crop, only ``pixel``.
        size: of the crop.
        limit: of the image.
    """
    if high - low > size:
        low, high = pixel, pixel + 1
    return int(np.random.randint(max(0, high - size), min(low, limit - size) + 1))


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
    """The augmentations of ``INPUT.*``: Detectron2's, in its order, and the extension's.

    Raises:
        UserError: a value of ``INPUT.CROP.*`` or ``INPUT.COLOR_AUG_SSD`` that cannot be used.
    """
    augmentations = utils.build_augmentation(cfg, is_train)
    if not is_train:
        return augmentations
    crop = cfg.INPUT.CROP
    if crop.ENABLED:
        after_resize, hold = crop.get("AFTER_RESIZE", False), crop.get("HOLD_INSTANCE", 0.0)
        _check_crop(crop.TYPE, crop.SIZE, hold)
        augmentations.insert(
            1 if after_resize else 0,
            RandomCropHoldingInstance(crop.TYPE, crop.SIZE, hold)
            if hold
            else T.RandomCrop(crop.TYPE, crop.SIZE),
        )
    if cfg.INPUT.get("COLOR_AUG_SSD", False):
        augmentations.append(_color_augmentation(cfg.INPUT.FORMAT))
    return augmentations


def _check_crop(crop_type: str, size: tuple[float, float], hold_instance: float) -> None:
    if crop_type not in CROP_TYPES:
        raise UserError(f"INPUT.CROP.TYPE {crop_type!r}: allowed are {list(CROP_TYPES)}")
    relative = crop_type.startswith("relative")
    if len(size) != 2 or not all(
        0 < side <= 1 if relative else side >= 1 and side == int(side) for side in size
    ):
        wanted = "two fractions in (0, 1]" if relative else "two numbers of pixels"
        raise UserError(f"INPUT.CROP.SIZE {list(size)}: {crop_type!r} crops take {wanted}")
    if crop_type == "absolute_range" and size[0] > size[1]:
        raise UserError(f"INPUT.CROP.SIZE {list(size)}: 'absolute_range' takes (least, greatest)")
    if not 0 <= hold_instance <= 1:
        raise UserError(f"INPUT.CROP.HOLD_INSTANCE {hold_instance}: a probability, 0 to 1")


def _color_augmentation(image_format: str) -> T.Transform:
    if image_format not in ("BGR", "RGB"):
        raise UserError(f"INPUT.COLOR_AUG_SSD needs INPUT.FORMAT BGR or RGB, not {image_format}")
    try:
        from detectron2.projects.point_rend import ColorAugSSDTransform
    except ImportError as error:
        raise UserError(
            f"INPUT.COLOR_AUG_SSD needs detectron2.projects.point_rend, which does not import "
            f"({error}): install it from Detectron2's projects/PointRend, or set it to False"
        ) from error
    return ColorAugSSDTransform(image_format)
