"""Annotation files with anything anywhere: records, or one line that says what is wrong."""

import copy
import json
import math

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.checks import check_panoptic_dataset

from .tiny_dataset import TinyDataset

VALUES = [
    *(None, True, False, 0, 1, 2, 7, -1, 2**24, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(0.5, 1.0, 1e300, math.nan, math.inf, -math.inf),
    *("", "1", "\ud800", "a\nb", "\0", "../../x", "x" * 5000),
    *([], {}, [[]], [None], [{}], [[1, 2, 3]], {"id": 1}, {"id": []}, [[math.nan] * 6]),
    *([10**400] * 4, [1e308] * 4, [1, 2, 0, 0], [-1, -1, -5, -5]),
    *(
        {"size": size, "counts": counts}
        for size in ([24, 32], [32, 24], [0, 0], [2**31, 2**31], [24], [[24], 32], None)
        for counts in ("Ph0", "", "~~~", "\ud800", [768], [-1, 769], [2**70], [0.5], b"".hex(), 3)
    ),
]
ACTIONS = ["replace", "delete", "duplicate", "swap"]


def places(content: object, path: tuple = ()) -> list[tuple]:
    """The path of everything in a JSON."""
    found = [path] if path else []
    children = content.items() if isinstance(content, dict) else ()
    children = enumerate(content) if isinstance(content, list) else children
    for key, child in children:
        found += places(child, (*path, key))
    return found


def inside(content: object, path: tuple) -> object:
    for key in path:
        content = content[key]
    return content


@st.composite
def mutated(draw, content: dict) -> dict:
    """With one to four faults, or what may be one."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 4))):
        known = places(content)
        if not known:
            break
        path = draw(st.sampled_from(known))
        parent, key = inside(content, path[:-1]), path[-1]
        action = draw(st.sampled_from(ACTIONS))
        if action == "delete":
            del parent[key]
        elif action == "duplicate" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif action == "swap":
            other = inside(content, draw(st.sampled_from(known)))
            parent[key] = copy.deepcopy(other)
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return content


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return TinyDataset(tmp_path_factory.mktemp("fuzz") / "data", num_images=1)


def outcome(call):
    """What it returns; None for our error, which has to be one line."""
    try:
        return call()
    except UserError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.faults
@pytest.mark.parametrize("which", ["panoptic", "instances"])
def test_any_json_is_records_or_one_line(original, which):
    @settings(max_examples=250, deadline=None)
    @given(mutated(copy.deepcopy(getattr(original, which))))
    def check(content: dict) -> None:
        data = copy.copy(original)
        setattr(data, which, content)
        data.write()
        with data.registered(instances=True) as name:
            metadata = MetadataCatalog.get(name)
            classes = outcome(lambda: (metadata.thing_classes, metadata.stuff_classes))
            records = outcome(lambda: DatasetCatalog.get(name))
        report = check_panoptic_dataset(**data.paths(instances=True))
        for fault in report.faults:
            assert "\n" not in str(fault)
        json.dumps(report.as_dict())
        # What is read without a word may have faults of its pixels; what is not read has one.
        if classes is None or records is None:
            assert report.faults
        else:
            are_sound(records, *map(len, classes))

    check()


def are_sound(records: list[dict], num_things: int, num_classes: int) -> None:
    assert records
    assert len({r["image_id"] for r in records}) == len(records)
    for record in records:
        segments = record["segments_info"]
        assert len({s["id"] for s in segments}) == len(segments)
        for segment in segments:
            assert 0 < segment["id"] < 2**24 and segment["iscrowd"] in (0, 1)
            limit = num_things if segment["isthing"] else num_classes
            assert 0 <= segment["category_id"] < limit
        for instance in record.get("annotations", ()):
            assert 0 <= instance["category_id"] < num_things
            assert all(map(math.isfinite, instance["bbox"]))
            polygons = instance.get("segmentation", [])
            if isinstance(polygons, list):
                assert all(math.isfinite(x) for polygon in polygons for x in polygon)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("entry", "field", "value"),
    [
        ("annotation", "file_name", "\0"),
        ("annotation", "file_name", "\ud800"),
        ("segment", "id", [3]),
        ("segment", "category_id", [3]),
    ],
)
def test_checks_of_what_was_found_by_chance(tmp_path, entry, field, value):
    data = TinyDataset(tmp_path / "data", num_images=1)
    annotation = data.annotation(1)
    found = {"annotation": annotation, "segment": annotation["segments_info"][0]}
    found[entry][field] = value
    data.write()
    assert check_panoptic_dataset(**data.paths()).faults


@pytest.mark.faults
def test_any_bytes_are_one_line_or_the_same(original):
    whole = json.dumps(original.panoptic).encode()

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(whole)), st.binary(max_size=6), st.integers(0, 40))
    def check(place: int, other: bytes, skipped: int) -> None:
        original.write()
        original.panoptic_json.write_bytes(whole[:place] + other + whole[place + skipped :])
        with original.registered() as name:
            outcome(lambda: DatasetCatalog.get(name))
        check_panoptic_dataset(**original.paths())

    check()
