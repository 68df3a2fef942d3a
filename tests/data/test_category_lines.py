"""Categories as lines of text."""

import hypothesis.strategies as st
import pytest
from detectron2.data.catalog import Metadata
from hypothesis import example, given

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.category_lines import (
    categories_of,
    first_difference,
    label_space_of,
    lines_of,
)
from panoptic_fpn_ext.data.registration import categories_to_metadata

names = st.text(min_size=1, max_size=8).map(lambda s: " ".join(s.split())).filter(bool)
categories = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(0, 500),
            "name": names,
            "isthing": st.integers(0, 1),
            "color": st.lists(st.integers(0, 255), min_size=3, max_size=3),
        }
    ),
    min_size=1,
    max_size=6,
    unique_by=(lambda c: c["id"], lambda c: c["name"]),
)


def metadata_of(listed, space="separated") -> Metadata:
    return Metadata(**categories_to_metadata(listed, label_space=space, source="test"))


@given(categories, st.sampled_from(["separated", "full"]))
@example([{"id": k, "name": str(k), "isthing": 1, "color": [0, 0, k]} for k in (0, 1)], "separated")
@example([{"id": 0, "name": "0", "isthing": 1, "color": [0, 0, 0]}], "separated")
def test_lines_give_the_same_metadata(listed, space):
    metadata = metadata_of(listed, space)
    again = metadata_of(categories_of(lines_of(metadata)), label_space_of(metadata))
    assert again.as_dict() == metadata.as_dict()


LINES = ["1 stuff #00ff10 sky", "7 thing #000000 traffic light"]


def test_what_a_line_says():
    assert categories_of(LINES) == [
        {"id": 1, "name": "sky", "isthing": 0, "color": [0, 255, 16]},
        {"id": 7, "name": "traffic light", "isthing": 1, "color": [0, 0, 0]},
    ]


@pytest.mark.parametrize(
    "line", ["", "1 stuff #00ff10", "x stuff #00ff10 sky", "1 stuf #0f0f0f a", 3]
)
def test_other_lines_are_one_error(line):
    with pytest.raises(UserError, match="MODEL.CATEGORIES: .* is not like"):
        categories_of([line])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (["3 stuff #000000 sky", "9 thing #111111 traffic light"], None),
        (LINES[:1], "number 1 is thing 'traffic light' and missing"),
        ([LINES[0], "7 stuff #000000 traffic light"], "number 1 is thing .* and stuff 'traffic"),
        (["1 stuff #00ff10 water", LINES[1]], "number 0 is stuff 'sky' and stuff 'water'"),
    ],
)
def test_names_and_kinds_are_what_counts(other, difference):
    found = first_difference(LINES, other)
    assert (
        found is None if difference is None else pytest.importorskip("re").match(difference, found)
    )
