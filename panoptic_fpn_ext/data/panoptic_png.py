"""Panoptic PNGs: 8-bit RGB images that hold a segment id, R + 256 G + 65536 B, in every pixel.

The format is that of COCO panoptic (https://cocodataset.org/#format-data). Id 0 is void.
"""

import os
import struct
from collections.abc import Collection, Iterable

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from kornia_rs.io import decode_image_png_u8
from PIL import Image

from ..errors import UserError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_MAX_EXPANSION = 1032  # of a byte that deflate has compressed
_MAX_ID = 2**24 - 1


def read_panoptic_png(file_name: str | os.PathLike) -> np.ndarray:
    """Read the segment ids of a panoptic PNG.

    Args:
        file_name: the PNG, 8-bit RGB or RGBA (the alpha channel is dropped).

    Returns:
        int32 array (H, W) of segment ids, 0 for void.

    Raises:
        UserError: the file is missing or damaged, or is not an 8-bit RGB PNG.
    """
    try:
        with PathManager.open(str(file_name), "rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:  # the latter at names that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file_name}: cannot read the panoptic PNG: {reason}") from error

    mode, shape = _read_header(content, file_name)
    rows_size = shape[0] * (1 + shape[1] * len(mode))  # each with the number of its filter
    if rows_size > _MAX_EXPANSION * len(content):
        raise UserError(
            f"{file_name}: damaged or truncated PNG: {len(content)} bytes cannot hold "
            f"{shape[1]}x{shape[0]} pixels; fetch or write it again"
        )
    # Pillow's rule for images: of more pixels than its limit twice, it reads none.
    if Image.MAX_IMAGE_PIXELS and shape[0] * shape[1] > 2 * Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"{file_name}: a PNG of {shape[1]}x{shape[0]} pixels, a bomb or a mistake; up to "
            f"{2 * Image.MAX_IMAGE_PIXELS} are read (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    try:
        pixels = decode_image_png_u8(content, shape, mode.lower())
    except Exception as error:
        raise UserError(
            f"{file_name}: damaged or truncated PNG; fetch or write it again"
        ) from error
    rgba = pixels if mode == "RGBA" else cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    ids = rgba.view("<i4")[..., 0]
    ids &= _MAX_ID
    return ids


def hint_of_swapped_bytes(unknown: Iterable[int], known: Collection[int]) -> str:
    """What to add to an error about ``unknown`` segment ids of a PNG that was written as BGR."""
    swapped = {i >> 16 | i & 0xFF00 | (i & 0xFF) << 16 for i in unknown}
    if not swapped or not swapped <= set(known):
        return ""
    return " (red and blue are swapped: OpenCV takes BGR, write_panoptic_png writes RGB)"


def write_panoptic_png(file_name: str | os.PathLike, ids: np.ndarray) -> None:
    """Write segment ids as a panoptic PNG.

    Args:
        file_name: where to write; its folder exists.
        ids: integer array (H, W) of segment ids from 0 (void) to 2**24 - 1.

    Raises:
        ValueError: ``ids`` is not such an array. Nothing is written then.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{file_name}: segment ids must be an integer array (H, W), "
            f"not {ids.dtype} of shape {ids.shape}"
        )
    if ids.min() < 0 or ids.max() > _MAX_ID:
        raise ValueError(
            f"{file_name}: segment ids must lie in 0..{_MAX_ID}, not {ids.min()}..{ids.max()}"
        )
    rgba = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    _, content = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR))
    with PathManager.open(str(file_name), "wb") as file:
        file.write(content.tobytes())


def _read_header(content: bytes, file_name: str | os.PathLike) -> tuple[str, tuple[int, int]]:
    """The mode, RGB or RGBA, and the (height, width) of an 8-bit PNG.

    Raises:
        UserError: it is not a PNG, or one of another kind.
    """
    if len(content) < 26 or not content.startswith(_SIGNATURE):
        raise UserError(f"{file_name}: not a PNG; expected an 8-bit RGB panoptic PNG")
    width, height, bit_depth, color_type = struct.unpack_from(">IIBB", content, 16)
    mode = _COLOR_TYPES.get(color_type, "unknown")
    if bit_depth != 8 or mode not in ("RGB", "RGBA"):
        raise UserError(
            f"{file_name}: {bit_depth}-bit {mode} PNG; expected 8-bit RGB, "
            "which holds segment ids as R + 256 G + 65536 B (write_panoptic_png writes it from a "
            "map of segment ids; a map of classes is none)"
        )
    return mode, (height, width)
