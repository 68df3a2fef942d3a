"""Drawing the scenes of Shapes: a picture, and what is in it.

Every scene has two to five kinds of stuff (sky, grass, water, sand, brick) with curved borders
between them, and up to six things (disc, square, triangle, star, ring) that hide one another in
part. Some scenes hold no thing, a crowd region, or unlabelled ("void") pixels.
"""

import colorsys
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

__all__ = ["CATEGORIES", "Category", "Layer", "Scene", "Segment", "draw_scene"]


class Category(NamedTuple):
    id: int
    name: str
    supercategory: str
    isthing: int
    color: tuple[int, int, int]


# As in COCO, the ids have gaps, and unlike in COCO things and stuff alternate: code that takes an
# id for an index, or the first categories for things, fails here at once.
CATEGORIES = (
    Category(2, "sky", "outdoor", 0, (112, 176, 228)),
    Category(3, "disc", "shape", 1, (214, 60, 148)),
    Category(5, "grass", "ground", 0, (104, 168, 72)),
    Category(8, "square", "shape", 1, (104, 84, 208)),
    Category(9, "triangle", "shape", 1, (240, 128, 40)),
    Category(14, "water", "ground", 0, (32, 112, 152)),
    Category(17, "star", "shape", 1, (246, 206, 64)),
    Category(21, "sand", "ground", 0, (212, 184, 136)),
    Category(22, "ring", "shape", 1, (216, 48, 56)),
    Category(30, "brick", "building", 0, (148, 92, 76)),
)
_BY_NAME = {category.name: category for category in CATEGORIES}


class Segment(NamedTuple):
    id: int
    category_id: int
    iscrowd: int


class Layer(NamedTuple):
    """One thing, stuff region, crowd or void patch (no category), hidden parts included.

    ``mask`` is (H, W) bool.
    """

    category: Category | None
    iscrowd: int
    mask: np.ndarray


class Scene(NamedTuple):
    """A picture and its panoptic ground truth.

    ``image`` is (H, W, 3) uint8, RGB. ``segment_map`` is (H, W) int32: the id of each pixel's
    segment, 0 where it has none. Every segment in ``segments`` has at least one pixel. ``layers``
    is what was painted, back to front.
    """

    image: np.ndarray
    segment_map: np.ndarray
    segments: tuple[Segment, ...]
    layers: tuple[Layer, ...]


# ---------------------------------------------------------------------------------------------
# Drawing. Lengths are given as fractions of the image's shorter side (`unit`), so that a scene
# looks the same at every size. Colours are float32 RGB in 0..1, channels first: (3, H, W) for a
# picture, (3, 1, 1) for a plain colour.

_Window = tuple[slice, slice]  # rows, columns


def _color(
    rng: np.random.Generator,
    hue: tuple[float, float],
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value))
    return _plain(*rgb)


def _plain(red: float, green: float, blue: float) -> np.ndarray:
    return np.array([red, green, blue], np.float32)[:, None, None]


def _mix(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return first + (second - first) * np.clip(amount, 0, 1)


def _tint(color: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """``color`` made darker (amount -1: a third of it) or lighter (amount 1: white)."""
    white = np.clip(amount, 0, 1)
    black = np.clip(amount, -1, 0) * np.float32(2 / 3)
    return color * (1 + black - white) + white


def _cover(outside: np.ndarray) -> np.ndarray:
    """The share of each pixel that a layer covers, by how far it lies outside it (in pixels)."""
    return np.clip(0.5 - outside, 0, 1)


class _Canvas:
    """A picture under work: pixels, and which layer owns each of them.

    Layers are painted back to front. Each has a floor, the least area that may remain of it, and
    a layer that would push another one below its floor is refused. So no segment ever has to be
    dropped once the picture is finished.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        height, width = size
        self.size = size
        self.unit = float(min(size))
        self.whole: _Window = (slice(0, height), slice(0, width))
        self.y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
        self.x = np.arange(width, dtype=np.float32)[None, :] + np.float32(0.5)
        self.image = np.zeros((3, height, width), np.float32)
        self.open = np.ones(size, bool)  # where layers may still be painted
        self.owner = np.zeros(size, np.intp)  # index into the three lists below
        self.layers = [Layer(None, 0, np.ones(size, bool))]
        self.areas = np.array([height * width])
        self.floors = np.array([0])

    def window(self, center: tuple[float, float], reach: float) -> _Window:
        """The part of the picture within ``reach`` of ``center`` (x, y), in pixels."""
        (x, y), (height, width) = center, self.size
        top, left = max(0, math.floor(y - reach)), max(0, math.floor(x - reach))
        return slice(top, min(height, math.ceil(y + reach))), slice(
            left, min(width, math.ceil(x + reach))
        )

    def claim(
        self,
        category: Category | None,
        window: _Window,
        mask: np.ndarray,
        floor: float,
        iscrowd: int = 0,
    ) -> bool:
        """Give a layer the open pixels of ``mask``, unless that leaves some layer too little."""
        mask = mask & self.open[window]
        taken = np.bincount(self.owner[window][mask], minlength=len(self.layers))
        areas = np.append(self.areas - taken, taken.sum())
        floors = np.append(self.floors, max(1, math.ceil(floor)))
        if (areas < floors).any():
            return False
        self.owner[window][mask] = len(self.layers)
        covered = np.zeros(self.size, bool)
        covered[window] = mask
        self.layers.append(Layer(category, iscrowd, covered))
        self.areas, self.floors = areas, floors
        return True

    def paint(
        self, window: _Window, alpha: np.ndarray, color: np.ndarray, shadow: float = 0.0
    ) -> None:
        """Blend ``color`` in, with a soft shadow on what lies beneath."""
        is_open = self.open[window]
        alpha = (alpha * is_open).astype(np.float32)
        image = self.image[:, window[0], window[1]]
        if shadow:
            shift = np.float32([[1, 0, 0.014 * self.unit], [0, 1, 0.02 * self.unit]])
            shade = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
            shade = cv2.GaussianBlur(shade, (0, 0), 0.018 * self.unit)
            image *= 1 - np.float32(shadow) * shade * is_open
        image += (color - image) * alpha


# Stuff: each texture is drawn on a patch, the pixels of some window.


class _Patch(NamedTuple):
    y: np.ndarray  # (h, 1), pixels
    x: np.ndarray  # (1, w)
    unit: float

    def noise(
        self, rng: np.random.Generator, cell_y: float, cell_x: float | None = None
    ) -> np.ndarray:
        """Smooth noise in about -1..1, (h, w), whose features are as large as a cell."""
        height, width = self.y.shape[0], self.x.shape[1]
        rows = math.ceil(height / max(cell_y * self.unit, 1)) + 1
        columns = math.ceil(width / max((cell_x or cell_y) * self.unit, 1)) + 1
        grid = rng.random((rows, columns), np.float32) * 2 - 1
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _sky(rng: np.random.Generator, patch: _Patch) -> np.ndarray:
    zenith = _color(rng, (0.56, 0.61), (0.45, 0.7), (0.78, 0.95))
    down = (patch.y - patch.y[0]) / len(patch.y)
    clouds = patch.noise(rng, 0.16, 0.36) + 0.5 * patch.noise(rng, 0.06, 0.12)
    sky = _mix(zenith, _plain(0.93, 0.95, 0.96), 0.9 * down)
    return _mix(sky, _plain(1, 1, 1), 1.2 * (clouds - rng.uniform(0, 0.5)))


def _grass(rng: np.random.Generator, patch: _Patch) -> np.ndarray:
    color = _color(rng, (0.24, 0.33), (0.5, 0.75), (0.5, 0.72))
    return _tint(color, 0.38 * patch.noise(rng, 0.045, 0.013) + 0.12 * patch.noise(rng, 0.2, 0.3))


def _water(rng: np.random.Generator, patch: _Patch) -> np.ndarray:
    color = _color(rng, (0.5, 0.57), (0.65, 0.9), (0.45, 0.65))
    length = rng.uniform(0.05, 0.075) * patch.unit
    waves = np.sin(2 * np.pi * (patch.y / length + 0.9 * patch.noise(rng, 0.1, 0.22)))
    glints = np.clip(waves - 0.55, 0, 1) * (1 + patch.noise(rng, 0.05, 0.1))
    return _tint(color, 0.16 * waves + 0.9 * glints)


def _sand(rng: np.random.Generator, patch: _Patch) -> np.ndarray:
    color = _color(rng, (0.09, 0.125), (0.28, 0.45), (0.8, 0.93))
    along = patch.y + rng.uniform(-0.5, 0.5) * patch.x
    dunes = np.sin(2 * np.pi * (along / (0.13 * patch.unit) + 0.7 * patch.noise(rng, 0.2)))
    grains = patch.noise(rng, 0.012)
    return _tint(color, 0.1 * dunes + 0.08 * grains - 0.3 * np.clip(grains - 0.35, 0, 1))


def _brick(rng: np.random.Generator, patch: _Patch) -> np.ndarray:
    color = _color(rng, (0, 0.045), (0.4, 0.6), (0.5, 0.68))
    mortar = _color(rng, (0.08, 0.1), (0.05, 0.15), (0.7, 0.82))
    height = rng.uniform(0.065, 0.085) * patch.unit
    width = 2.1 * height
    row = patch.y / height + rng.uniform(0, 1)
    column = patch.x / width + 0.5 * (np.floor(row) % 2)
    shades = rng.uniform(-0.3, 0.22, (64, 64)).astype(np.float32)
    shade = shades[np.floor(row).astype(int) % 64, np.floor(column).astype(int) % 64]
    wall = _tint(color, shade + 0.12 * patch.noise(rng, 0.02))
    joint = np.minimum(  # the distance to the nearest one, in pixels
        height * np.abs(row - np.round(row)), width * np.abs(column - np.round(column))
    )
    return _mix(wall, mortar, 0.008 * patch.unit + 0.5 - joint)


_STUFF: dict[str, Callable[[np.random.Generator, _Patch], np.ndarray]] = {
    "sky": _sky,
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "brick": _brick,
}


# Things: each shape is a function of polar coordinates, `distance` to its outline (negative
# inside) and `pattern`, an amount for `_tint`. A shape's radius is 1.


class _Shape(NamedTuple):
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    pattern: Callable[[np.ndarray, np.ndarray], np.ndarray]
    hue: tuple[float, float]


def _fold(theta: np.ndarray, sides: int) -> np.ndarray:
    """The angle to the nearest of ``sides`` evenly spread rays."""
    return np.abs((theta * sides / (2 * np.pi) + 0.5) % 1 - 0.5) * (2 * np.pi / sides)


def _regular(sides: int, apothem: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda radius, theta: radius * np.cos(_fold(theta, sides)) - apothem


def _star_distance(radius: np.ndarray, theta: np.ndarray) -> np.ndarray:
    tip, notch = 1.18, 0.6
    angle = _fold(theta, 5)
    # The line from the tip (tip, 0) to the notch, which lies half a ray further.
    edge_x = notch * math.cos(math.pi / 5) - tip
    edge_y = notch * math.sin(math.pi / 5)
    across = edge_y * (radius * np.cos(angle) - tip) - edge_x * radius * np.sin(angle)
    return across / math.hypot(edge_x, edge_y)


def _checks(radius: np.ndarray, theta: np.ndarray) -> np.ndarray:
    waves = np.sin(7.5 * radius * np.cos(theta)) * np.sin(7.5 * radius * np.sin(theta))
    return 0.45 * np.clip(6 * waves, -1, 1)


def _ball(radius: np.ndarray, theta: np.ndarray) -> np.ndarray:
    glint = np.exp(-6 * (radius**2 - 0.9 * radius * np.cos(theta) + 0.2025))
    return 0.85 * glint - 0.75 * np.clip(radius, 0, 1) ** 4


_SHAPES: dict[str, _Shape] = {
    "disc": _Shape(lambda radius, theta: radius - 1, _ball, (0.83, 0.94)),
    "square": _Shape(_regular(4, 0.8), _checks, (0.67, 0.76)),
    "triangle": _Shape(
        _regular(3, 0.6),
        lambda radius, theta: 0.6 * np.clip(4 * np.sin(11 * radius * np.cos(theta)), -1, 0.3),
        (0.045, 0.085),
    ),
    "star": _Shape(
        _star_distance,  # facets: each ray has a light and a dark half
        lambda radius, theta: 0.115 + 0.235 * np.sign(np.sin(5 * theta)),
        (0.13, 0.16),
    ),
    "ring": _Shape(
        lambda radius, theta: np.abs(radius - 0.75) - 0.28,
        lambda radius, theta: np.clip(5 * np.sin(4 * theta), -0.1, 0.95),
        (-0.02, 0.02),
    ),
}


class _Placed(NamedTuple):
    """A shape at its place: per pixel of the window, polar coordinates about its centre."""

    name: str
    scale: float  # the shape's radius in pixels
    window: _Window
    radius: np.ndarray  # 1 = the shape's radius
    theta: np.ndarray
    outside: np.ndarray  # the distance to the outline, in pixels


def _place(
    canvas: _Canvas, name: str, center: tuple[float, float], scale: float, angle: float
) -> _Placed:
    window = canvas.window(center, 1.2 * scale + 0.09 * canvas.unit)  # with room for the shadow
    right = canvas.x[:, window[1]] - np.float32(center[0])
    down = canvas.y[window[0]] - np.float32(center[1])
    radius = np.hypot(right, down) / np.float32(scale)
    if name == "disc":
        angle = -2.2  # its highlight stays where the light is
    theta = np.arctan2(down, right) - np.float32(angle)
    outside = _SHAPES[name].distance(radius, theta) * np.float32(scale)
    return _Placed(name, scale, window, radius, theta, outside)


def _paint_shape(canvas: _Canvas, rng: np.random.Generator, placed: _Placed) -> None:
    shape = _SHAPES[placed.name]
    # One shape in eight has any hue at all: there, only form and pattern tell.
    hue = shape.hue if rng.random() > 0.125 else (0.0, 1.0)
    color = _color(rng, hue, (0.65, 0.9), (0.82, 1.0))
    rim = np.exp(np.minimum(placed.outside, 0) / np.float32(0.08 * placed.scale))
    color = _tint(color, shape.pattern(placed.radius, placed.theta) - 0.5 * rim)
    canvas.paint(placed.window, _cover(placed.outside), color, shadow=0.45)


def _blob(
    rng: np.random.Generator,
    canvas: _Canvas,
    center: tuple[float, float],
    radii: tuple[float, float],
) -> np.ndarray:
    """How far each pixel lies outside a wavy ellipse, in pixels (negative inside)."""
    right, down = (canvas.x - center[0]) / radii[0], (canvas.y - center[1]) / radii[1]
    theta = np.arctan2(down, right)
    waves = sum(0.08 * np.sin(k * theta + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return ((np.hypot(right, down) - 1 - waves) * min(radii)).astype(np.float32)


def _draw_region(canvas: _Canvas, rng: np.random.Generator, name: str, outside: np.ndarray) -> None:
    mask = outside < 0
    if canvas.claim(_BY_NAME[name], canvas.whole, mask, 0.04 * mask.size):
        top = int(np.flatnonzero(mask.any(1))[0]) - math.ceil(0.06 * canvas.unit)
        window = (slice(max(top, 0), canvas.size[0]), canvas.whole[1])
        patch = _Patch(canvas.y[window[0]], canvas.x, canvas.unit)
        canvas.paint(window, _cover(outside[window]), _STUFF[name](rng, patch), shadow=0.3)


def _draw_stuff(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Two to four bands, one under the other, with wavy borders; perhaps a pond in them."""
    height, width = canvas.size
    names = [str(name) for name in rng.permutation(["grass", "water", "sand", "brick"])]
    if rng.random() < 0.8:
        names.insert(0, "sky")
    bands = int(rng.choice([2, 3, 4], p=[0.5, 0.38, 0.12]))
    across = canvas.x / width
    _draw_region(canvas, rng, names[0], np.full(canvas.size, -1, np.float32))
    for i, name in enumerate(names[1:bands], start=1):
        level = (i + rng.uniform(-0.25, 0.25)) / bands + rng.uniform(-0.16, 0.16) * (across - 0.5)
        for waves, height_of_waves in ((1.0, 0.045), (2.3, 0.02), (5.0, 0.006)):
            phase = 2 * np.pi * (waves * across + rng.uniform(0, 1))
            level = level + rng.uniform(0.4, 1) * height_of_waves * np.sin(phase)
        _draw_region(canvas, rng, name, height * level - canvas.y)
    if rng.random() < 0.3 and bands < len(names):
        center = (width * rng.uniform(0.15, 0.85), height * rng.uniform(0.6, 0.95))
        radii = (width * rng.uniform(0.2, 0.34), height * rng.uniform(0.12, 0.2))
        _draw_region(canvas, rng, names[bands], _blob(rng, canvas, center, radii))


def _draw_void(canvas: _Canvas, rng: np.random.Generator) -> None:
    """An unlabelled grey patch."""
    height, width = canvas.size
    center = (width * rng.uniform(0.1, 0.9), height * rng.uniform(0.1, 0.9))
    radii = (canvas.unit * rng.uniform(0.08, 0.18), canvas.unit * rng.uniform(0.08, 0.18))
    outside = _blob(rng, canvas, center, radii)
    mask = outside < 0
    if canvas.claim(None, canvas.whole, mask, 0.4 * mask.sum()):
        grey = rng.normal(0.5, 0.12, canvas.size).astype(np.float32)
        grey += 0.15 * _Patch(canvas.y, canvas.x, canvas.unit).noise(rng, 0.05)
        canvas.paint(canvas.whole, _cover(outside), grey)


def _draw_void_strip(canvas: _Canvas, rng: np.random.Generator) -> None:
    """An unlabelled dark strip along one side, in front of all that is painted later."""
    turns = int(rng.integers(4))
    strip = np.rot90(canvas.open, turns)  # a view
    strip[: max(1, round(rng.uniform(0.05, 0.09) * len(strip)))] = False
    canvas.image[:, ~canvas.open] = rng.uniform(0.05, 0.2)


def _draw_crowd(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Many tiny shapes of one kind, close together: one crowd segment, the gaps included."""
    height, width = canvas.size
    unit = canvas.unit
    name = str(rng.choice(list(_SHAPES)))
    middle = (width * rng.uniform(0.25, 0.75), height * rng.uniform(0.25, 0.75))
    spread = (unit * rng.uniform(0.12, 0.24), unit * rng.uniform(0.1, 0.16))
    members = []
    # A sunflower's order spreads the members evenly; the jitter hides it.
    for i in range(count := int(rng.integers(12, 24))):
        turn, reach = 2.39996 * i, math.sqrt((i + 0.5) / count)
        center = (
            middle[0] + spread[0] * reach * math.cos(turn) + rng.normal(0, 0.012) * unit,
            middle[1] + spread[1] * reach * math.sin(turn) + rng.normal(0, 0.012) * unit,
        )
        scale = unit * rng.uniform(0.028, 0.042)
        members.append(_place(canvas, name, center, scale, rng.uniform(0, 2 * np.pi)))
    mask = np.zeros(canvas.size, np.uint8)
    for placed in members:
        mask[placed.window] |= placed.outside < 0
    reach = max(3, 2 * round(0.04 * unit) + 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel).astype(bool)
    if canvas.claim(_BY_NAME[name], canvas.whole, mask, 0.6 * mask.sum(), iscrowd=1):
        for placed in members:
            _paint_shape(canvas, rng, placed)


def _draw_things(canvas: _Canvas, rng: np.random.Generator, count: int) -> None:
    height, width = canvas.size
    last = None
    for _ in range(count):
        for _ in range(12):  # attempts to find a place that leaves enough of all others
            name = str(rng.choice(list(_SHAPES)))
            scale = canvas.unit * rng.uniform(0.075, 0.215)
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            if last is not None and rng.random() < 0.4:  # close to another, so that they overlap
                turn, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.1) * (scale + last[2])
                x, y = last[0] + reach * math.cos(turn), last[1] + reach * math.sin(turn)
            inset = 0.35 * scale  # at most a third of a thing lies out of the picture
            x, y = min(max(x, inset), width - inset), min(max(y, inset), height - inset)
            placed = _place(canvas, name, (x, y), scale, rng.uniform(0, 2 * np.pi))
            mask = placed.outside < 0
            if canvas.claim(_BY_NAME[name], placed.window, mask, 0.5 * mask.sum()):
                _paint_shape(canvas, rng, placed)
                last = (x, y, scale)
                break


def _develop(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """What a camera adds: light from one side, a colour cast, exposure, softness, noise."""
    height, width = canvas.size
    slope = rng.uniform(-0.12, 0.12, 2).tolist()
    light = 1 + slope[0] * (canvas.x / width - 0.5) + slope[1] * (canvas.y / height - 0.5)
    gain = rng.uniform(0.9, 1.08) * _plain(*rng.uniform(0.96, 1.04, 3))
    image = np.ascontiguousarray((canvas.image * light * gain).transpose(1, 2, 0), np.float32)
    image = cv2.GaussianBlur(image, (0, 0), max(0.2, rng.uniform(0.002, 0.005) * canvas.unit))
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.01, 0.03))
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _segment_id(category: Category, taken: set[int], rng: np.random.Generator) -> int:
    """An unused id that shows as the category's colour, or for a thing as a shade of it."""
    color = np.array(category.color)
    while (number := int(color @ [1, 256, 65536])) in taken:
        color = np.clip(category.color + rng.integers(-48, 49, 3), 0, 255)
    return number


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draw one scene of ``size`` (height, width), at least 32 each, in pixels."""
    canvas = _Canvas(size)
    empty, crowd, void = rng.random(3)
    if void < 0.07:
        _draw_void_strip(canvas, rng)
    _draw_stuff(canvas, rng)
    if 0.07 <= void < 0.15:
        _draw_void(canvas, rng)
    if empty >= 0.08:
        count = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.15, 0.2, 0.25, 0.2, 0.12, 0.08]))
        if crowd < 0.09:
            _draw_crowd(canvas, rng)
            count = min(count, 3)
        _draw_things(canvas, rng, count)
    image = _develop(canvas, rng)

    ids = [0] * len(canvas.layers)
    segments = []
    for i, layer in enumerate(canvas.layers):
        if layer.category is not None:
            ids[i] = _segment_id(layer.category, set(ids), rng)
            segments.append(Segment(ids[i], layer.category.id, layer.iscrowd))
    segment_map = np.array(ids, np.int32)[canvas.owner]
    return Scene(image, segment_map, tuple(segments), tuple(canvas.layers[1:]))
