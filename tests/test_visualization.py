"""Drawings of panoptic maps against pixel-by-pixel loops; labels and colours by what is seen."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.visualization import (
    OPACITY,
    OUTLINE,
    SteadyColors,
    agreeing_colors,
    draw_panoptic,
    drawn_segments,
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


class TestSteadyColors:
    """Squares of 12 pixels on 60x60, by their place and what they are: (y, x, id, category)."""

    @staticmethod
    def frame(*squares: tuple[int, int, int, int]) -> tuple[np.ndarray, list[dict]]:
        ids = np.full((60, 60), 300)
        for y, x, number, _ in squares:
            ids[y : y + 12, x : x + 12] = number
        things = [{"id": n, "isthing": True, "category_id": c} for *_, n, c in squares]
        return ids, [SEGMENTS[2], *things]

    def test_a_thing_that_moves_keeps_its_own(self) -> None:
        """Two of a category move against each other, under ids that change."""
        colors, seen = SteadyColors(METADATA), []
        for k in range(16):
            right, left = (10, 3 * k, 1 + k, 0), (30, 46 - 3 * k, 90 - k, 0)
            found = colors(*self.frame(*((right, left) if k % 2 else (left, right))))
            seen.append((found[1 + k], found[90 - k], found[300]))
        assert len(set(seen)) == 1
        assert len(set(seen[0])) == 3
        assert seen[0][2] == tuple(METADATA.stuff_colors[1])

    def test_one_that_passes_keeps_apart(self) -> None:
        """A thing goes over another of its category; both keep what they had."""
        colors, seen = SteadyColors(METADATA), set()
        for k in range(12):
            found = colors(*self.frame((22, 24, 1, 0), (19 + k % 2, 4 * k, 2, 0)))
            seen.add((found[1], found[2]))
        assert len(seen) == 1

    @pytest.mark.parametrize(("frames", "is_known"), [(0, True), (8, True), (9, False)])
    def test_one_that_is_missed_for_a_while(self, frames, is_known) -> None:
        colors = SteadyColors(METADATA, memory=8)
        old = colors(*self.frame((10, 10, 1, 0), (40, 40, 2, 0)))
        for _ in range(frames):
            between = colors(*self.frame((40, 10, 3, 0), (40, 40, 4, 0)))
            assert between[4] == old[2]
        new = colors(*self.frame((10, 10, 5, 0), (40, 40, 6, 0)))
        assert new[6] == old[2]
        if is_known:
            assert new[5] == old[1]
        if 0 < frames <= 8:
            assert between[3] not in (old[1], old[2]), "its colour is kept for it"

    def test_another_category_is_another_thing(self) -> None:
        colors = SteadyColors(METADATA)
        old, new = (colors(*self.frame((10, 10, 1, c)))[1] for c in (0, 1))
        assert old == tuple(METADATA.thing_colors[0]) and new == tuple(METADATA.thing_colors[1])

    def test_frames_without_things(self) -> None:
        colors, empty = SteadyColors(METADATA), (np.zeros((60, 60), int), [])
        assert colors(*empty) == {}
        old = colors(*self.frame((10, 10, 1, 0)))
        assert colors(*empty) == {}
        assert colors(*self.frame((10, 12, 2, 0)))[2] == old[1]


class TestDrawnSegments:
    @staticmethod
    def instances(*, masks: bool) -> Instances:
        """Of 4x6 pixels: one of a low score covers the left half, one of a high score a corner."""
        instances = Instances((4, 6))
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 3, 4], [2, 0, 6, 2]]))
        instances.scores, instances.pred_classes = torch.tensor([0.3, 0.8]), torch.tensor([1, 0])
        if masks:
            instances.pred_masks = torch.zeros(2, 4, 6, dtype=torch.bool)
            instances.pred_masks[0, :, :3] = instances.pred_masks[1, :2, 2:] = True
        return instances

    @pytest.mark.parametrize("masks", [True, False])
    @pytest.mark.parametrize("upon_classes", [True, False])
    def test_instances_lie_by_score_upon_classes(self, masks, upon_classes) -> None:
        output = {"instances": self.instances(masks=masks)}
        classes = np.array([[0, 0, 0, 0, 0, 2]] * 4)
        if upon_classes:
            output["sem_seg"] = torch.nn.functional.one_hot(torch.tensor(classes), 3).movedim(2, 0)
        ids, segments = drawn_segments(output)
        what = {0: None} | {s["id"]: (s["isthing"], s["category_id"]) for s in segments}
        expected = [
            [
                (True, 0)
                if x >= 2 and y < 2
                else (True, 1)
                if x < 3
                else (False, classes[y, x])
                if upon_classes
                else None
                for x in range(6)
            ]
            for y in range(4)
        ]
        assert [[what[value] for value in row] for row in ids.tolist()] == expected
        assert {s["category_id"]: round(s["score"], 2) for s in segments if s["isthing"]} == {
            1: 0.3,
            0: 0.8,
        }

    def test_a_panoptic_map_is_taken_as_it_is(self) -> None:
        given = torch.tensor([[7, 2]]), SEGMENTS
        output = {"panoptic_seg": given, "instances": self.instances(masks=True)}
        ids, segments = drawn_segments(output)
        assert ids.tolist() == [[7, 2]] and segments == SEGMENTS

    def test_nothing_to_draw(self) -> None:
        with pytest.raises(UserError, match="gives no panoptic_seg, sem_seg or instances"):
            drawn_segments({"proposals": []})
