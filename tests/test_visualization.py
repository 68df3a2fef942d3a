"""Drawings of panoptic maps against pixel-by-pixel loops; labels and colours by what is seen."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from panoptic_fpn_ext.visualization import (
    OPACITY,
    OUTLINE,
    agreeing_colors,
    draw_panoptic,
    place_labels,
    segment_colors,
)

METADATA = Metadata(
    name="drawn",
    thing_classes=["cup", "grey ball"],
    thing_colors=[[200, 40, 40], [128, 128, 128]],
    stuff_classes=["things", "table", "wall"],
    stuff_colors=[[0, 0, 0], [40, 90, 200], [60, 200, 60]],
)
SEGMENTS = [
    {"id": 7, "isthing": True, "category_id": 0, "score": 0.874},
    {"id": 8, "isthing": True, "category_id": 0, "score": 0.5},
    {"id": 300, "isthing": False, "category_id": 1},
    {"id": 2, "isthing": False, "category_id": 2},
]
VOID = (0, -1, 99)  # the last is in no list
MAPS = arrays(np.int32, (5, 6), elements=st.sampled_from([*VOID, *(s["id"] for s in SEGMENTS)]))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def drawn_by_a_loop(image: np.ndarray, ids: np.ndarray, colors: dict) -> np.ndarray:
    picture = image.copy()
    for y, x in np.ndindex(ids.shape):
        if ids[y, x] not in colors:
            continue
        color = np.array(colors[ids[y, x]], np.float32)
        beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        beside = [(j, i) for j, i in beside if 0 <= j < ids.shape[0] and 0 <= i < ids.shape[1]]
        others = [ids[p] if ids[p] in colors else 0 for p in beside]
        if any(other != ids[y, x] for other in others):
            picture[y, x] = np.rint(OUTLINE * color)
        else:
            picture[y, x] = np.rint(image[y, x] + OPACITY * (color - image[y, x]))
    return picture


class TestMasks:
    @given(MAPS)
    def test_every_pixel_is_its_segments_and_void_stays(self, ids: np.ndarray) -> None:
        image, colors = noise(5, 6), segment_colors(SEGMENTS, METADATA)
        picture = draw_panoptic(image, ids, SEGMENTS, METADATA, labels=False)
        expected = drawn_by_a_loop(image, ids, colors)
        assert np.abs(picture.astype(int) - expected).max() <= 1, "but for rounding"
        void = np.isin(ids, VOID)
        assert np.array_equal(picture[void], image[void])

    def test_a_hole_stays_a_hole(self) -> None:
        ids = np.zeros((60, 60), np.uint8)
        cv2.circle(ids, (30, 30), 25, 7, -1)
        cv2.circle(ids, (30, 30), 12, 0, -1)
        image = noise(60, 60)
        picture = draw_panoptic(image, ids, SEGMENTS, METADATA, labels=False)
        changed = (picture != image).any(2)
        assert not changed[ids == 0].any()
        assert changed[ids == 7].mean() > 0.99

    @given(MAPS, st.integers(2, 4))
    def test_enlarged_each_pixel_is_a_block(self, ids: np.ndarray, scale: int) -> None:
        image = noise(5, 6)
        picture = draw_panoptic(image, ids, SEGMENTS, METADATA, scale=scale, labels=False)
        size = (6 * scale, 5 * scale)
        larger = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
        blocks = ids.repeat(scale, 0).repeat(scale, 1)
        assert np.array_equal(
            picture, draw_panoptic(larger, blocks, SEGMENTS, METADATA, labels=False)
        )

    @pytest.mark.parametrize("scale", [0.01, 0.3, 1, 2.55])
    def test_size_and_type(self, scale: float) -> None:
        ids = torch.full((30, 50), 7)
        picture = draw_panoptic(noise(30, 50), ids, SEGMENTS, METADATA, scale=scale)
        assert picture.shape == (max(1, round(30 * scale)), max(1, round(50 * scale)), 3)
        assert picture.dtype == np.uint8

    def test_nothing_to_draw(self) -> None:
        image = noise(30, 50)
        assert np.array_equal(draw_panoptic(image, np.zeros((30, 50), int), [], METADATA), image)

    def test_the_image_is_left_alone(self) -> None:
        image = noise(40, 40)
        draw_panoptic(image, np.full((40, 40), 300), SEGMENTS, METADATA)
        assert np.array_equal(image, noise(40, 40))


class TestLabels:
    @settings(deadline=None)
    @given(
        arrays(np.int32, (12, 15), elements=st.integers(0, 5)),
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 17)), min_size=5, max_size=5),
        st.lists(st.booleans(), min_size=5, max_size=5),
    )
    def test_lie_within_and_do_not_overlap(self, numbers, sizes, are_things) -> None:
        used = np.zeros(numbers.shape, int)
        places = place_labels(numbers, sizes, are_things)
        assert len(places) == 5
        for (height, width), place in zip(sizes, places, strict=True):
            if place is not None:
                y, x = place
                assert 0 <= y <= 12 - height and 0 <= x <= 15 - width
                used[y : y + height, x : x + width] += 1
        assert used.max() <= 1

    def test_a_large_segments_lies_in_it(self) -> None:
        numbers = np.ones((100, 100), np.int32)
        numbers[:, 60:] = 2
        for k, (y, x) in enumerate(place_labels(numbers, [(10, 30)] * 2, [True, False]), 1):
            assert (numbers[y : y + 10, x : x + 30] == k).all()

    def test_a_small_things_lies_beside_it(self) -> None:
        numbers = np.ones((100, 100), np.int32)
        numbers[50:60, 50:60] = 2
        numbers[35:50, 45:65] = 3
        _, (y, x), _ = place_labels(numbers, [(10, 30), (10, 30), (0, 0)], [False, True, True])
        covered = numbers[y : y + 10, x : x + 30]
        assert (covered == 1).all(), "neither it nor its neighbour is covered"
        assert abs(y - 55) <= 20 and abs(x + 15 - 55) <= 30

    def test_without_room_there_is_none(self) -> None:
        numbers = np.ones((10, 10), np.int32)
        assert place_labels(numbers, [(12, 5)], [True]) == [None]
        assert place_labels(numbers, [(5, 12)], [False]) == [None]
        assert place_labels(numbers, [(8, 8)] * 2, [True] * 2) == [(1, 1), None]

    def test_names_are_written_in_the_segments_colour(self) -> None:
        ids = np.full((80, 120), 300)
        colors = {s["id"]: (s["id"] % 255, 10, 20) for s in SEGMENTS}
        picture = draw_panoptic(noise(80, 120), ids, SEGMENTS, METADATA, colors=colors)
        without = draw_panoptic(
            noise(80, 120), ids, SEGMENTS, METADATA, colors=colors, labels=False
        )
        changed = (picture != without).any(2)
        y, x = np.nonzero(changed)
        box = picture[y.min() : y.max() + 1, x.min() : x.max() + 1]
        assert (box == (45, 10, 20)).all(2).mean() > 0.5
        assert (box.sum(2) > 500).any(), "white letters on the dark box"

    def test_names_of_any_kind(self) -> None:
        metadata = Metadata(name="odd", thing_classes=["Grünfläche\n汉", ""], stuff_classes=[])
        for category in (0, 1):
            segment = {"id": 1, "isthing": True, "category_id": category, "iscrowd": 1}
            picture = draw_panoptic(noise(50, 90), np.ones((50, 90)), [segment], metadata)
            assert picture.shape == (50, 90, 3)


class TestColors:
    def test_stuff_has_its_categorys_and_things_shades_that_differ(self) -> None:
        segments = [
            *({"id": k, "isthing": True, "category_id": k % 2} for k in range(1, 60)),
            {"id": 60, "isthing": False, "category_id": 1},
        ]
        colors = segment_colors(segments, METADATA)
        assert colors[60] == (40, 90, 200)
        assert colors[1] == (128, 128, 128) and colors[2] == (200, 40, 40)
        assert len(set(colors.values())) == 60
        assert all(0 <= channel <= 255 for color in colors.values() for channel in color)
        assert colors == segment_colors(segments, METADATA)

    def test_categories_without_colours_or_names(self) -> None:
        segments = [
            {"id": 10 * k + thing, "isthing": bool(thing), "category_id": k}
            for k, thing in itertools.product(range(8), (0, 1))
        ]
        for metadata in (Metadata(name="bare"), Metadata(name="null", thing_colors=None)):
            colors = segment_colors(segments, metadata)
            assert len(set(colors.values())) == 16
            draw_panoptic(noise(40, 90), np.full((40, 90), 11), segments, metadata)

    @given(MAPS, MAPS, st.booleans())
    def test_what_matches_has_one_colour(self, ours, theirs, crowd: bool) -> None:
        truth = [dict(s) for s in SEGMENTS]
        truth[0]["iscrowd"] = int(crowd)
        found, true = agreeing_colors((ours, SEGMENTS), (theirs, truth), METADATA)
        assert found.keys() == true.keys() == {s["id"] for s in SEGMENTS}
        labelled = np.isin(theirs, [s["id"] for s in truth])
        for a, b in itertools.product(SEGMENTS, truth):
            if not (a["isthing"] and b["isthing"]):
                continue
            mine, other = ours == a["id"], theirs == b["id"]
            union = ((mine | other) & labelled).sum()
            matches = union and (mine & other).sum() / union > 0.5 and not b.get("iscrowd")
            assert (found[a["id"]] == true[b["id"]]) == bool(matches)
        for stuff in SEGMENTS[2:]:
            assert found[stuff["id"]] == true[stuff["id"]]
