"""Reading images as Detectron2 does; one that is damaged, or another than its record says, is told.

Pillow, with which Detectron2 reads, fills up what a damaged JPEG lacks and says nothing. Here JPEGs
go through the same libjpeg-turbo by way of its own interface, which does say it.
"""

import functools
import io
import logging
from typing import Any

import cv2
import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from kornia_rs.io import decode_image_jpegturbo
from PIL import Image, UnidentifiedImageError

from ..errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
"""Of the files of a folder that are taken for images; all that Pillow knows can be read."""

WIDE_MODES = ("I", "F")
"""Pillow's modes of 16 and 32 bits and of floating point, which it would cut off at 255."""

_ORIENTATION = 0x0112  # of EXIF: 1 as it is, 2 to 4 flipped, 5 to 8 with its sides exchanged

logger = logging.getLogger(__name__)


def read_image(record: dict[str, Any], image_format: str, *, strict: bool = False) -> np.ndarray:
    """Read the image of a record, (H, W, C) uint8, the pixels of Detectron2's ``read_image``.

    A JPEG that is whole as a file but has damaged pixels, as some of every large dataset do, is
    read as far as it goes, with a warning that names it.

    Args:
        record: with ``file_name``; ``height`` and ``width`` are compared, where they are there.
        image_format: Detectron2's ``INPUT.FORMAT``.
        strict: whether damaged pixels are an error.

    Raises:
        UserError: it is missing or damaged, or not of the size that the record says, if it does.
    """
    file_name = record["file_name"]
    try:
        with PathManager.open(file_name, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as header:
            kind, mode, (width, height) = header.format, header.mode, header.size
            orientation = _orientation(header)
    except UnidentifiedImageError as error:
        raise UserError(f"{file_name}: cannot read the image: not an image file") from error
    except Exception as error:  # parsers raise whatever they like on damaged files
        raise _unreadable(file_name, error) from error
    if kind == "EPS":  # Pillow would run Ghostscript
        raise UserError(f"{file_name}: cannot read the image: EPS files are programs, not pixels")
    if mode.startswith(WIDE_MODES):
        raise UserError(
            f"{file_name}: pixels of mode {mode}, of more than 8 bits, and there is no one way to "
            "make them 8: convert the image"
        )
    # Before it is decoded: what a header promises may fill the memory.
    check_size(
        file_name, (width, height) if orientation in range(5, 9) else (height, width), record
    )

    pixels, damaged = None, False
    if kind in ("JPEG", "MPO") and mode in ("RGB", "L"):
        try:
            pixels = decode_image_jpegturbo(content, "rgb")
            damaged = pixels.shape[:2] != (height, width)
        except Exception:
            damaged = True
    try:
        if damaged or image_format not in ("RGB", "BGR") or orientation in range(2, 9):
            pixels = None
        # For BGR Detectron2 returns a reversed view, which transforms are very slow to read.
        is_bgr = image_format == "BGR"
        if pixels is None:
            pixels = utils.read_image(file_name, format="RGB" if is_bgr else image_format)
        image = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if is_bgr else pixels
    except Exception as error:
        raise _unreadable(file_name, error) from error
    check_size(file_name, image.shape[:2], record)
    if damaged and strict:
        raise UserError(
            f"{file_name}: cannot read the image: a damaged JPEG, some of its pixels are made up; "
            "fetch it again"
        )
    if damaged:
        _warn_of_damage(file_name)
    return image


def check_size(file_name: str, size: tuple[int, int], record: dict[str, Any]) -> None:
    """
    Args:
        file_name: of an image or a panoptic PNG, for the error.
        size: its height and width.
        record: what says how large it is, if it does.

    Raises:
        UserError: it is of another size.
    """
    expected = record.get("height", size[0]), record.get("width", size[1])
    if tuple(size) != expected:
        raise UserError(
            f"{file_name}: {size[1]}x{size[0]} pixels (width x height), but the annotations say "
            f"{expected[1]}x{expected[0]}"
        )


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # as Detectron2: damaged EXIF is none
        return None


def _unreadable(file_name: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"{file_name}: cannot read the image: {reason or type(error).__name__}")


@functools.cache  # once for each file
def _warn_of_damage(file_name: str) -> None:
    logger.warning(
        "%s: a damaged JPEG, some of its pixels are made up; tools/check_dataset.py lists all such "
        "files",
        file_name,
    )
