"""Drawing panoptic maps on their images: exact masks, colours that agree, labels that can be read.

Pictures are (H, W, 3) uint8, RGB.
"""

import colorsys
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError
from .evaluation.panoptic_maps import joint_counts
from .layers.argmax import argmax_classes

Color = tuple[int, int, int]
Segments = Sequence[Mapping[str, Any]]
"""``segments_info``: of each segment ``id``, ``category_id`` and ``isthing``, perhaps ``score``."""

OPACITY = 0.6  # of a segment on its image
OUTLINE = 0.6  # how bright it is, compared with the segment's colour
_DEFAULT_COLORS = colormap(rgb=True).astype(int).tolist()
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def draw_panoptic(
    image: np.ndarray,
    panoptic_seg: torch.Tensor | np.ndarray,
    segments_info: Segments,
    metadata: Metadata,
    *,
    colors: Mapping[int, Color] | None = None,
    scale: float = 1,
    labels: bool = True,
) -> np.ndarray:
    """Draw each segment on exactly its own pixels; those of no segment stay as they are.

    Args:
        image: (H, W, 3) uint8, RGB.
        panoptic_seg: (H, W) integers, segment ids.
        segments_info: the segments. Ids that are not among them are void.
        metadata: names and colours of the categories, ``thing_classes``, ``thing_colors``,
            ``stuff_classes`` and ``stuff_colors``.
        colors: of the segments, by id; by default :func:`segment_colors`.
        scale: size of the picture over that of the image.
        labels: write names, and scores where segments have them. Labels lie within the picture and
            do not overlap; one for which there is no such place is left out.

    Returns:
        The picture, (H * scale, W * scale, 3) uint8, RGB.
    """
    if colors is None:
        colors = segment_colors(segments_info, metadata)
    numbers = _numbers(panoptic_seg, segments_info)
    if scale != 1:
        size = tuple(max(1, round(side * scale)) for side in numbers.shape[::-1])
        image = cv2.resize(
            image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        )
        numbers = cv2.resize(numbers, size, interpolation=cv2.INTER_NEAREST_EXACT)

    paint = np.array([(0, 0, 0), *(colors[s["id"]] for s in segments_info)], np.float32)[numbers]
    picture = np.where(
        _outlines(numbers)[..., None], OUTLINE * paint, image + OPACITY * (paint - image)
    )
    picture = np.where((numbers > 0)[..., None], np.rint(picture), image).astype(np.uint8)
    return _with_labels(picture, numbers, segments_info, metadata, colors) if labels else picture


def drawn_segments(output: Mapping[str, Any]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """What is drawn of a model's outputs: the panoptic map; without one, semantic classes as stuff,
    and upon them instances, those of higher scores on top.

    Args:
        output: of one image (H, W), with ``panoptic_seg``, ``sem_seg`` or ``instances``.

    Returns:
        (H, W) integers, segment ids, and the segments.

    Raises:
        UserError: it has none of these.
    """
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        return ids.cpu().numpy(), segments
    if not {"sem_seg", "instances"} & output.keys():
        raise UserError("the network gives no panoptic_seg, sem_seg or instances to draw")
    if "sem_seg" in output:
        ids, segments = semantic_map(output["sem_seg"])
    else:
        ids, segments = np.zeros(output["instances"].image_size, np.int32), []
    if "instances" in output:
        upper, things = instance_map(output["instances"])
        last = int(ids.max())
        ids = np.where(upper > 0, last + upper, ids)
        segments += [{**thing, "id": last + thing["id"]} for thing in things]
    return ids, segments


def semantic_map(logits: torch.Tensor) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Semantic classes as segments.

    Args:
        logits: ``sem_seg``, (C, H, W).

    Returns:
        (H, W) integers, segment ids from 1, and the segments.
    """
    ids = argmax_classes(logits).cpu().numpy().astype(np.int32) + 1
    return ids, [
        {"id": number, "isthing": False, "category_id": number - 1}
        for number in np.unique(ids).tolist()
    ]


def instance_map(
    instances: Instances, score_threshold: float = 0.0
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Instances as segments; where they overlap, that of the higher score is seen.

    Args:
        instances: of one image (H, W); without ``pred_masks`` their boxes are taken.
        score_threshold: those of lower scores are left out.

    Returns:
        (H, W) integers, segment ids from 1, 0 where there is none, and the segments.
    """
    instances = instances[instances.scores >= score_threshold].to("cpu")
    ids = np.zeros(instances.image_size, np.int32)
    for k in reversed(instances.scores.argsort(descending=True, stable=True).tolist()):
        ids[_mask(instances, k)] = k + 1
    known = zip(instances.pred_classes.tolist(), instances.scores.tolist(), strict=True)
    return ids, [
        {"id": k, "isthing": True, "category_id": category, "score": score}
        for k, (category, score) in enumerate(known, start=1)
    ]


def _mask(instances: Instances, k: int) -> Any:
    """Where one is: its mask, or, of a network without masks, its box."""
    if instances.has("pred_masks"):
        return instances.pred_masks[k].bool().numpy()
    x0, y0, x1, y1 = instances.pred_boxes.tensor[k].round().int().tolist()
    return np.s_[y0:y1, x0:x1]


def segment_colors(
    segments_info: Segments,
    metadata: Metadata,
    *,
    given: Mapping[int, Color] | None = None,
    taken: Collection[Color] = (),
) -> dict[int, Color]:
    """The colour of each segment, by its id: that of its category; of things, a shade of it.

    Args:
        segments_info: the segments.
        metadata: see :func:`draw_panoptic`. Categories without a colour get one of Detectron2's.
        given: colours that segments have already.
        taken: shades that no other thing may have.
    """
    colors = dict(given or {})
    taken = {*taken, *colors.values()}
    for segment in segments_info:
        if segment["id"] in colors:
            continue
        _, color = _category(segment, metadata)
        if segment["isthing"]:
            color = next(shade for shade in _shades(color) if shade not in taken)
            taken.add(color)
        colors[segment["id"]] = color
    return colors


def agreeing_colors(
    prediction: tuple[torch.Tensor | np.ndarray, Segments],
    truth: tuple[torch.Tensor | np.ndarray, Segments],
    metadata: Metadata,
) -> tuple[dict[int, Color], dict[int, Color]]:
    """Colours for two maps of an image, the same for segments that match.

    They match as for PQ: of one category, their IoU, void left out of the union, above 0.5. No
    other thing has the colour of one of the truth.

    Args:
        prediction, truth: (H, W) integers, segment ids, and the segments.
        metadata: see :func:`draw_panoptic`.

    Returns:
        Those of the prediction's segments and of the truth's, by id.
    """
    true_colors = segment_colors(truth[1], metadata)
    given = {ours: true_colors[theirs] for ours, theirs in _matches(prediction, truth).items()}
    colors = segment_colors(prediction[1], metadata, given=given, taken=true_colors.values())
    return colors, true_colors


class SteadyColors:
    """Colours of the segments of a video: a thing keeps its own from frame to frame.

    A thing is taken for the one of an earlier frame, of its category, that it overlaps most. One
    that is not seen is remembered for some frames, and nothing else gets its colour meanwhile.
    """

    def __init__(self, metadata: Metadata, *, memory: int = 8, min_iou: float = 0.1) -> None:
        """
        Args:
            metadata: see :func:`draw_panoptic`.
            memory: for how many frames a thing that is not seen is remembered.
            min_iou: of the masks of a thing in two frames.
        """
        self._metadata, self._memory, self._min_iou = metadata, memory, min_iou
        self._things: list[_Thing] = []

    def __call__(
        self, panoptic_seg: torch.Tensor | np.ndarray, segments_info: Segments
    ) -> dict[int, Color]:
        """
        Args:
            panoptic_seg, segments_info: of the next frame, all frames being of one size.

        Returns:
            The colours of its segments, by id.
        """
        numbers = _numbers(panoptic_seg, segments_info)
        known = self._recognized(numbers, segments_info)
        lost = [thing for thing in self._things if thing not in known.values()]
        colors = segment_colors(
            segments_info,
            self._metadata,
            given={segments_info[k]["id"]: thing.color for k, thing in known.items()},
            taken=[thing.color for thing in lost],
        )
        for thing in lost:
            thing.unseen += 1
        self._things = [thing for thing in lost if thing.unseen <= self._memory]
        for k, segment in enumerate(segments_info, start=1):
            own = (numbers == k).astype(np.uint8) if segment["isthing"] else None
            if own is not None and own.any():
                x, y, width, height = cv2.boundingRect(own)
                box = slice(y, y + height), slice(x, x + width)
                color = colors[segment["id"]]
                self._things.append(_Thing(segment, color, box, own[box].astype(bool)))
        return colors

    def _recognized(self, numbers: np.ndarray, segments_info: Segments) -> dict[int, "_Thing"]:
        """Things of earlier frames, by their places among the segments; best matches first."""
        areas = np.bincount(numbers.ravel(), minlength=len(segments_info) + 1)
        pairs = []
        for place, thing in enumerate(self._things):
            common = np.bincount(numbers[thing.box][thing.mask], minlength=len(areas))
            ious = common / (areas + thing.mask.sum() - common)
            for k, segment in enumerate(segments_info):
                if ious[k + 1] >= self._min_iou and _same_category(thing.segment, segment):
                    pairs.append((ious[k + 1], place, k))
        known: dict[int, _Thing] = {}
        used = set()
        for _, place, k in sorted(pairs, reverse=True):
            if k not in known and place not in used:
                known[k] = self._things[place]
                used.add(place)
        return known


@dataclass(eq=False)
class _Thing:
    """One of an earlier frame, as it was last seen."""

    segment: Mapping[str, Any]
    color: Color
    box: tuple[slice, slice]
    mask: np.ndarray  # (h, w) bool, within the box
    unseen: int = 0


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of labels and headings, ``size`` pixels high."""
    return ImageFont.truetype(str(_FONT), size)


def _matches(
    prediction: tuple[torch.Tensor | np.ndarray, Segments],
    truth: tuple[torch.Tensor | np.ndarray, Segments],
) -> dict[int, int]:
    """The true segment that each predicted one matches, where one does; ids."""
    ours, theirs = prediction[1], truth[1]
    shape = len(ours) + 1, len(theirs) + 1
    pixels = joint_counts(_numbers(*prediction), _numbers(*truth), shape)
    common = pixels[1:, 1:]
    union = common.sum(1)[:, None] + pixels[:, 1:].sum(0) - common
    return {
        ours[a]["id"]: theirs[b]["id"]
        for a, b in np.argwhere(2 * common > union).tolist()
        if _same_category(ours[a], theirs[b]) and not theirs[b].get("iscrowd")
    }


def _same_category(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (bool(a["isthing"]), a["category_id"]) == (bool(b["isthing"]), b["category_id"])


def _numbers(panoptic_seg: torch.Tensor | np.ndarray, segments_info: Segments) -> np.ndarray:
    """(H, W) int32: which of the segments, counted from 1, each pixel belongs to; 0 is void."""
    is_tensor = isinstance(panoptic_seg, torch.Tensor)
    ids = panoptic_seg.cpu().numpy() if is_tensor else np.asarray(panoptic_seg)
    values, inverse = np.unique(ids, return_inverse=True)
    place = {segment["id"]: k for k, segment in enumerate(segments_info, start=1)}
    table = np.array([place.get(value, 0) for value in values.tolist()], np.int32)
    return table[inverse].reshape(ids.shape)


def _outlines(numbers: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels beside one of another segment."""
    edge = np.zeros(numbers.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = numbers[a] != numbers[b]
        edge[a] |= differ
        edge[b] |= differ
    return edge


# Names and colours


def _category(segment: Mapping[str, Any], metadata: Metadata) -> tuple[str, Color]:
    """Name and colour of a segment's category."""
    kind, number = "thing" if segment["isthing"] else "stuff", segment["category_id"]
    names, colors = (metadata.get(f"{kind}_{what}", None) for what in ("classes", "colors"))
    color = (
        colors[number]
        if colors
        else _DEFAULT_COLORS[(2 * number + (kind == "stuff")) % len(_DEFAULT_COLORS)]
    )
    return names[number] if names else f"{kind} {number}", tuple(color)


def _shades(color: Color) -> Iterator[Color]:
    """A colour, and others that look like it but can be told apart; no end of them."""
    yield color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    for k in itertools.count(1):
        turn = 0.012 * ((k + 1) // 2) * (-1) ** k
        light = 0.25 + (lightness - 0.25 + 0.29 * k) % 0.5
        rgb = colorsys.hls_to_rgb(hue + turn, light, max(saturation, 0.3))
        yield tuple(round(255 * channel) for channel in rgb)


# Labels


def _with_labels(
    picture: np.ndarray,
    numbers: np.ndarray,
    segments_info: Segments,
    metadata: Metadata,
    colors: Mapping[int, Color],
) -> np.ndarray:
    letters = font(min(max(round(min(numbers.shape) / 30), 11), 24))
    texts = [_label(segment, metadata) for segment in segments_info]
    ascent, descent = letters.getmetrics()
    margin = round(descent / 2) + 1
    sizes = [
        (ascent + descent, round(letters.getlength(text)) + 2 * margin) if text else (0, 0)
        for text in texts
    ]
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    places = place_labels(numbers, sizes, [bool(s["isthing"]) for s in segments_info])
    for segment, text, size, place in zip(segments_info, texts, sizes, places, strict=True):
        if place is None:
            continue
        (height, width), (y, x) = size, place
        color = colors[segment["id"]]
        is_light = np.dot(color, (0.299, 0.587, 0.114)) > 140
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
        draw.text((x + margin, y), text, fill="black" if is_light else "white", font=letters)
    return np.asarray(canvas)


def _label(segment: Mapping[str, Any], metadata: Metadata) -> str:
    name, _ = _category(segment, metadata)
    words = name.split()
    if segment.get("iscrowd"):
        words.append("(crowd)")
    if segment["isthing"] and segment.get("score") is not None:
        words.append(f"{float(segment['score']):.0%}")
    return " ".join(words)


def place_labels(
    numbers: np.ndarray, sizes: Sequence[tuple[int, int]], are_things: Sequence[bool]
) -> list[tuple[int, int] | None]:
    """Where the labels of N segments go: within the picture, clear of each other.

    A label lies in its segment; that of a thing with too little room lies beside it, and covers as
    little of all things as can be.

    Args:
        numbers: (H, W) int32: which segment, counted from 1, each pixel belongs to; 0 is void.
        sizes: height and width of each label.
        are_things: whether each segment is a thing.

    Returns:
        The top left corner of each, (y, x); None where there is no such place.
    """
    places: list[tuple[int, int] | None] = [None] * len(sizes)
    free = np.ones(numbers.shape, bool)
    things = np.isin(numbers, [k for k, thing in enumerate(are_things, 1) if thing])
    areas = np.bincount(numbers.ravel(), minlength=len(sizes) + 1)[1:]
    # Stuff has more room, and so comes last.
    for k in sorted(range(len(sizes)), key=lambda k: (not are_things[k], -areas[k])):
        (height, width), area = sizes[k], areas[k]
        if not area or not height or height > numbers.shape[0] or width > numbers.shape[1]:
            continue
        x0, y0, w, h = cv2.boundingRect((numbers == k + 1).astype(np.uint8))
        # All that is close enough for the label; coordinates are within it from here on.
        top, left = max(0, y0 - 2 * height), max(0, x0 - 2 * width)
        around = np.s_[top : y0 + h + 2 * height, left : x0 + w + 2 * width]
        own, others, y0, x0 = numbers[around] == k + 1, things[around], y0 - top, x0 - left
        room, box = height * width, (height, width)
        allowed = _sums(free[around], box) == room
        inside = _sums(own, box)
        if are_things[k] and (inside.max() < room or area < 3 * room):
            center, covered = (y0 + h / 2, x0 + w / 2), _sums(others, box)
            near = np.zeros_like(allowed)
            near[max(0, y0 - 2 * height) : y0 + h + height, max(0, x0 - width) : x0 + w] = True
            allowed &= near
        else:
            distance = cv2.distanceTransform(np.pad(own, 1).astype(np.uint8), cv2.DIST_L2, 5)
            center = np.subtract(np.unravel_index(distance.argmax(), distance.shape), 1)
            covered = room - inside + _sums(others & ~own, box)
            allowed &= 2 * inside > room
        if not allowed.any():
            continue
        y, x = np.ogrid[: allowed.shape[0], : allowed.shape[1]]
        away = np.hypot(y + height / 2 - center[0], x + width / 2 - center[1])
        cost = np.where(allowed, away + covered * (sum(numbers.shape) / room), np.inf)
        y, x = map(int, np.unravel_index(cost.argmin(), cost.shape))
        y, x = top + y, left + x
        free[y : y + height, x : x + width] = False
        places[k] = y, x
    return places


def _sums(mask: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """The pixels of a mask (H, W) in a box (h, w) at each place: (H - h + 1, W - w + 1) int32."""
    height, width = box
    integral = cv2.integral(mask.astype(np.uint8))
    rows = integral[height:] - integral[:-height]
    return rows[:, width:] - rows[:, :-width]
