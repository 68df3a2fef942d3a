"""What pages show of an image: it, its ground truth, and the predictions of one or two runs."""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata

from ..data.image_files import read_image
from ..errors import UserError
from .analysis import MATCH, PanopticImage, Segment
from .panoptic_maps import read_ground_truth, segment_places
from .panoptic_matching import Category

LONG_SIDE = 480  # of pictures, in pixels
STATES = {
    MATCH: "found",
    "thing_stuff": "thing or stuff",
    "made_up": "made up",
    "outline": "poor outline",
    "class": "wrong class",
}
"""What a :attr:`Segment.state` is called, where that is not its name."""
GAINED, LOST, IN_NEITHER = "gained", "lost", "missed"


@dataclass
class ShownImage:
    """What a run has of an image.

    Attributes:
        file_name, pan_seg_file_name: where the image and its ground truth are.
        pq: of the image alone, in percent; nan where it has no segments.
        png: of a small map of the prediction, see :func:`index_png`.
        segments: all true and predicted ones, in the order of the maps' numbers.
        scores: of the predicted ones, by id; of stuff None.
    """

    file_name: str
    pan_seg_file_name: str
    pq: float
    png: bytes
    segments: list[Segment]
    scores: dict[int, float | None]

    @classmethod
    def of(
        cls,
        record: Mapping[str, Any],
        png: bytes,
        scores: dict[int, float | None],
        found: PanopticImage,
    ) -> "ShownImage":
        """That of a dataset dict, and of what was found in the image."""
        files = record["file_name"], record["pan_seg_file_name"]
        return cls(*files, found.pq(), png, found.segments, scores)


def picture(
    images: Mapping[str, ShownImage],
    names: Mapping[Category, str],
    metadata: Metadata,
    caption: str,
) -> dict[str, Any]:
    """What the pages' script draws of an image.

    Args:
        images: of one run, or of two of which the second is compared with the first, by what their
            predictions are called.
        names: of the categories.
        metadata: ``thing_colors`` and ``stuff_colors``, if any.
        caption: what is written above.

    Returns:
        ``name``, ``caption``, ``size``, ``image`` (a data URL) and ``maps``: by name, those of the
        predictions and "truth", each ``png`` (a data URL of which segment, from 1, each pixel
        belongs to) and ``segments``, of each what is told, the kind of its colour, and its own
        colour.

    Raises:
        UserError: the image or its ground truth cannot be read, or is another than that which a
            run was evaluated on.
    """
    from ..visualization import agreeing_colors  # it draws what evaluators keep: they come first

    runs = list(images.values())
    shown = runs[0]
    image = cv2.cvtColor(read_image({"file_name": shown.file_name}, "RGB"), cv2.COLOR_RGB2BGR)
    size = small_size(image.shape[:2])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])
    true = [segment for segment in shown.segments if segment.true]
    png = index_png(read_ground_truth(shown.pan_seg_file_name), [s.id for s in true])
    truth = _numbers(png), _infos(true)

    maps = {}
    for label, run in images.items():
        theirs = [s for s in run.segments if s.true]
        if [(s.id, s.category) for s in theirs] != [(s.id, s.category) for s in true]:
            raise UserError(f"{shown.pan_seg_file_name}: of other true segments in {label}")
        sizes = {size, *(_numbers(p).shape[::-1] for p in (png, run.png))}
        if len(sizes) > 1:
            raise UserError(f"{shown.file_name}: of another size than in {label}")
        segments = [segment for segment in run.segments if not segment.true]
        colors, true_colors = agreeing_colors(
            (_numbers(run.png), _infos(segments)), truth, metadata
        )
        maps[label] = {
            "png": _url("png", run.png),
            "segments": [
                [_told(s, names, run.scores.get(s.id)), s.state, list(colors[k])]
                for k, s in enumerate(segments, 1)
            ],
        }
    told = _compared(*images, runs, names) if len(runs) == 2 else None
    told = told or [(_told(s, names), s.state) for s in true]
    maps["truth"] = {
        "png": _url("png", png),
        "segments": [[*t, list(true_colors[k])] for k, t in enumerate(told, 1)],
    }
    return {
        "name": os.path.basename(shown.file_name),
        "caption": caption,
        "size": size,
        "image": _url("jpeg", jpeg.tobytes()),
        "maps": maps,
    }


def _told(segment: Segment, names: Mapping[Category, str], score: float | None = None) -> str:
    state = STATES.get(segment.state, segment.state)
    text = f"{names[segment.category]} · {state} · IoU {segment.iou:.2f}"
    return text if score is None else f"{text} · score {score:.2f}"


def _compared(
    a: str, b: str, runs: Sequence[ShownImage], names: Mapping[Category, str]
) -> list[tuple[str, str]]:
    """What is told of the true segments, and the kind of change."""
    ours, theirs = ([s for s in run.segments if s.true] for run in runs)
    result = []
    for before, after in zip(ours, theirs, strict=True):
        found = before.state == MATCH, after.state == MATCH
        kind, text = {
            (True, True): (MATCH, "found by both"),
            (False, True): (GAINED, f"found by {b} alone"),
            (True, False): (LOST, f"found by {a} alone"),
            (False, False): (IN_NEITHER, "found by neither"),
        }[found]
        if before.state == "ignored":
            kind, text = before.state, before.state
        ious = f"IoU {a} {before.iou:.2f}, {b} {after.iou:.2f}"
        result.append((f"{names[before.category]} · {text} · {ious}", kind))
    return result


def _infos(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """``segments_info`` with the numbers of a map for ids."""
    return [
        {"id": k, "isthing": s.category[0], "category_id": s.category[1]}
        for k, s in enumerate(segments, 1)
    ]


def _numbers(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED).astype(int)


def small_size(shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the picture of an image (H, W)."""
    scale = min(1.0, LONG_SIDE / max(shape))
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def index_png(ids: np.ndarray, segment_ids: Sequence[int]) -> bytes:
    """A small map of which segment, from 1, pixels belong to: an 8-bit PNG.

    Segments beyond the 255th are void in it.

    Args:
        ids: integer array (H, W) of segment ids.
        segment_ids: those of the segments, in order.
    """
    (height, width), (small_width, small_height) = ids.shape, small_size(ids.shape)
    rows = (2 * np.arange(small_height) + 1) * height // (2 * small_height)
    columns = (2 * np.arange(small_width) + 1) * width // (2 * small_width)
    places = segment_places(ids[rows][:, columns], segment_ids)
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, png = cv2.imencode(".png", np.where(places < 256, places, 0).astype(np.uint8), fast)
    return png.tobytes()


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
