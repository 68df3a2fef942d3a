"""Records as a naive reader makes them, of sound JSON files and odd ones; wrong ones are told."""

import copy
import gc
import json
import math
from unittest import mock

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data import records

from .tiny_dataset import CATEGORIES, TinyDataset

THINGS = {7: 0, 9: 1}
STUFF = {3: 1}


def is_int(v):
    return isinstance(v, int) and not isinstance(v, bool)


def is_number(v):
    return (is_int(v) or isinstance(v, float)) and abs(v) < 1e9


def is_id(v):
    return is_int(v) or (isinstance(v, str) and v != "")


def is_flag(v):
    return isinstance(v, int) and v in (0, 1)


def are_numbers(v):
    return isinstance(v, list) and all(map(is_number, v))


def is_runs(counts):
    """What is not drawn at random here has tests of its own."""
    if isinstance(counts, list):
        return all(is_int(c) and c >= 0 for c in counts) and sum(counts) == 24 * 32
    return counts == "Ph0"


def is_mask(v):
    if isinstance(v, dict):
        return v.get("size") == [24, 32] and is_runs(v.get("counts"))
    return isinstance(v, list) and all(map(are_numbers, v))


FIELDS = {
    "image": {
        "id": lambda v: v == 1 and is_int(v),
        "file_name": lambda v: isinstance(v, str) and v != "",
        "height": lambda v: is_int(v) and v > 0,
        "width": lambda v: is_int(v) and v > 0,
        "coco_url": lambda v: True,
    },
    "annotation": {
        "image_id": lambda v: v == 1 and is_int(v),
        "file_name": lambda v: isinstance(v, str) and v != "",
        "segments_info": lambda v: v == [],
    },
    "segment": {
        "id": lambda v: is_int(v) and 0 < v < 2**24,
        "category_id": lambda v: is_int(v) and v in {*THINGS, *STUFF},
        "iscrowd": is_flag,
        "area": lambda v: True,
        "color": lambda v: True,
    },
    "instance": {
        "image_id": lambda v: is_id(v) and v in (1, 2),
        "category_id": lambda v: is_int(v) and v in THINGS,
        "bbox": lambda v: are_numbers(v) and len(v) == 4,
        "iscrowd": is_flag,
        "segmentation": lambda v: is_mask(v) and v != [],  # since others have masks
        "keypoints": lambda v: are_numbers(v) and len(v) % 3 == 0,
        "area": lambda v: True,
    },
}
"""The fields of each kind of entry, and whether a value of the first one will do."""

VALUES = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, 2**24 - 1, 2**24, 10**9, 2**70, 10**400),
    *(1.0, 0.5, -0.0, 1e9, 1e300, math.nan, math.inf, -math.inf),
    *("", "1", "Straße 東京.jpg", "\ud800", "a\nb", "../x.png"),
    *([], [[]], [1, 2, 3, 4], [0.1, 2, 3.25, 1e-9], [1, 2, 3], [1, 2, 3, True], [1, 2, 3, "4"]),
    *([[1, 2, 3, 4, 5.5, 6.123456789]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]], [1], ["a"], [None]),
    *([[math.nan] * 6], [[1e9] * 6], {}, {"size": [24, 32]}, {"size": [24, 32], "counts": "Ph0"}),
    *({"size": [24, 32], "counts": [768]}, {"size": [32, 24], "counts": [768]}, {"id": 1}),
]
DELETED = object()


def entries(data: TinyDataset) -> dict[str, dict]:
    """The first entry of each kind."""
    annotation = data.panoptic["annotations"][0]
    return {
        "image": data.panoptic["images"][0],
        "annotation": annotation,
        "segment": annotation["segments_info"][0],
        "instance": data.instances["annotations"][0],
    }


def needed(kind: str, field: str) -> bool:
    optional = ("iscrowd", "keypoints", "area", "color", "coco_url")
    return field not in optional


def naive_records(data: TinyDataset) -> list[dict]:
    """Of the files as they are, read with json alone."""
    panoptic = json.loads(data.panoptic_json.read_bytes())
    instances = json.loads(data.instances_json.read_bytes())
    images = {image["id"]: image for image in panoptic["images"]}
    found = []
    for annotation in panoptic["annotations"]:
        image = images[annotation["image_id"]]
        segments = []
        for info in annotation["segments_info"]:
            category = info["category_id"]
            segments.append({"iscrowd": 0, **info, "isthing": category in THINGS})
            segments[-1]["category_id"] = THINGS.get(category, STUFF.get(category, 0))
        png = f"{data.pngs}/{annotation['file_name']}"
        pairs = (f"{s['id']}={0 if s['isthing'] else s['category_id']}" for s in segments)
        found.append(
            {
                "file_name": f"{data.images}/{image['file_name']}",
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": png,
                "segments_info": segments,
                "sem_seg_file_name": f"panoptic-sem-seg://{','.join(pairs)}/{png}",
                "annotations": [
                    naive_instance(instance)
                    for instance in instances["annotations"]
                    if instance["image_id"] == image["id"] and has_a_mask(instance)
                ],
            }
        )
    return found


def has_a_mask(instance: dict) -> bool:
    """Unless its polygons are lines and points."""
    mask = instance.get("segmentation")
    return not mask or isinstance(mask, dict) or any(map(is_polygon, mask))


def is_polygon(p: list) -> bool:
    return len(p) >= 6 and len(p) % 2 == 0


def naive_instance(instance: dict) -> dict:
    result = {
        "iscrowd": instance.get("iscrowd", 0),
        "bbox": instance["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": THINGS[instance["category_id"]],
    }
    mask = instance.get("segmentation")
    if isinstance(mask, dict):
        empty = mask_util.encode(np.zeros((24, 32), np.uint8, order="F"))
        result["segmentation"] = empty if isinstance(mask["counts"], list) else mask
    elif mask:
        result["segmentation"] = [polygon for polygon in mask if is_polygon(polygon)]
    if instance.get("keypoints"):
        shift = (0.5, 0.5, 0)
        points = enumerate(instance["keypoints"])
        result["keypoints"] = [value + shift[k % 3] for k, value in points]
    return result


def load(data: TinyDataset) -> list[dict]:
    with data.registered(instances=True, categories=CATEGORIES) as name:
        return DatasetCatalog.get(name)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return TinyDataset(tmp_path_factory.mktemp("records") / "data")


def changed(original: TinyDataset, changes: list[tuple[str, str, object]]) -> TinyDataset:
    """The dataset with other values, written."""
    data = copy.deepcopy(original)
    data.instances["images"] = copy.deepcopy(data.instances["images"])
    found = entries(data)
    for kind, field, value in changes:
        if value is DELETED:
            found[kind].pop(field, None)
        else:
            found[kind][field] = value
    data.write()
    return data


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields]
)
def test_any_value_is_taken_as_it_is_or_told(original, kind, field):
    for value in (*VALUES, DELETED):
        data = changed(original, [(kind, field, value)])
        sound = not needed(kind, field) if value is DELETED else FIELDS[kind][field](value)
        if sound:
            assert load(data) == naive_records(data), value
            continue
        with pytest.raises(UserError, match=r"(panoptic|instances)\.json: ") as error:
            load(data)
        assert "\n" not in str(error.value)


MUTATIONS = st.sampled_from([(kind, field) for kind, fields in FIELDS.items() for field in fields])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(MUTATIONS, st.sampled_from([*VALUES, DELETED])), min_size=2, max_size=4))
def test_quick_or_exact_makes_no_difference(original, changes):
    data = changed(original, [(*place, value) for place, value in changes])

    def outcome():
        try:
            return load(data)
        except UserError as error:
            return str(error)

    quick = outcome()
    with mock.patch.object(records, "_first", lambda quickly, exactly: exactly()):
        assert outcome() == quick


def test_sound_files_are_read_once(original):
    data = changed(original, [])
    with mock.patch.object(records, "read_json", side_effect=AssertionError):
        assert load(data) == naive_records(data)
        with data.registered(instances=True) as name:
            assert MetadataCatalog.get(name).thing_classes == ["car", "person"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings(original, encoding):
    data = changed(original, [("image", "file_name", "Straße 東京.jpg")])
    text = data.panoptic_json.read_text()
    data.panoptic_json.write_bytes(
        json.dumps(json.loads(text), ensure_ascii=False).encode(encoding)
    )
    assert load(data)[0]["file_name"] == f"{data.images}/Straße 東京.jpg"
    with data.registered() as name:
        assert MetadataCatalog.get(name).thing_classes == ["car", "person"]


def test_an_id_of_a_category_that_is_a_list(original):
    data = changed(original, [])
    data.panoptic["categories"] = [{**CATEGORIES[0], "id": [3]}, *CATEGORIES[1:]]
    data.write()
    with pytest.raises(UserError, match=r"category \[3\] \(sky\) is not one that"):
        load(data)


numbers = st.one_of(
    st.integers(-100, 500_000).map(lambda k: k / 100),
    st.floats(-1e9, 1e9, exclude_min=True, exclude_max=True),
    st.integers(-(10**9) + 1, 10**9 - 1),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=1, max_size=200))
def test_coordinates_stay_what_they_are(original, polygons):
    data = changed(original, [("instance", "segmentation", polygons)])
    instance = load(data)[0]["annotations"][0]
    assert instance["segmentation"] == polygons


def test_equal_coordinates_are_one_object(original):
    data = changed(original, [("instance", "segmentation", [[20.31] * 6, [20.31, 7] * 3])])
    data.instances["annotations"][-1]["bbox"][0] = 20.31
    data.write()
    loaded = load(data)
    coordinates = [
        number
        for record in loaded
        for instance in record["annotations"]
        for numbers in (instance["bbox"], *instance["segmentation"])
        for number in numbers
    ]
    assert coordinates.count(20.31) == 10
    assert len({id(number) for number in coordinates}) == len(set(coordinates))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(original, enabled):
    changed(original, [("segment", "id", 0)])
    was, frozen = gc.isenabled(), gc.get_freeze_count()  # not 0 from the start in Python 3.12
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(UserError):
            load(original)
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == frozen
    finally:
        (gc.enable if was else gc.disable)()
