"""Registering panoptic datasets: categories, label spaces, records."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from panoptic_fpn_ext import UserError, register_panoptic_dataset

CATEGORIES = [
    {"id": 40, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
    {"id": 7, "name": "car", "isthing": 1, "color": [0, 0, 142]},
    {"id": 3, "name": "road", "isthing": 0},
    {"id": 21, "name": "person", "isthing": 1, "color": [220, 20, 60]},
]


@pytest.fixture
def register(tmp_path):
    """Write a panoptic JSON, register it, return its metadata; cleaned up afterwards."""
    names = []

    def register(content, name="test_panoptic", **arguments):
        path = tmp_path / "panoptic.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        register_panoptic_dataset(name, tmp_path, tmp_path / "png", path, **arguments)
        names.append(name)
        return MetadataCatalog.get(name)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def content(**changes):
    segments = [{"id": 5, "category_id": 21, "iscrowd": 0}, {"id": 9, "category_id": 40}]
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 10, "width": 20}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": CATEGORIES,
        **changes,
    }


def test_separated_label_space(register):
    metadata = register(content())
    assert metadata.thing_classes == ["car", "person"]
    assert metadata.stuff_classes == ["things", "road", "sky"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 21: 1}
    assert metadata.stuff_dataset_id_to_contiguous_id == {0: 0, 3: 1, 40: 2}
    assert metadata.thing_sem_seg_ids == (0, 0)
    assert metadata.thing_colors == [[0, 0, 142], [220, 20, 60]]


def test_full_label_space(register):
    metadata = register(content(), label_space="full")
    assert metadata.stuff_classes == ["road", "car", "person", "sky"]
    assert metadata.stuff_dataset_id_to_contiguous_id == {3: 0, 7: 1, 21: 2, 40: 3}
    assert metadata.thing_sem_seg_ids == (1, 2)


def test_things_only_and_stuff_only(register):
    things = register(content(categories=[CATEGORIES[1]]), name="things")
    assert (things.thing_classes, things.stuff_classes) == (["car"], ["things"])
    stuff = register(content(categories=[CATEGORIES[0]]), name="stuff")
    assert (stuff.thing_classes, stuff.stuff_classes) == ([], ["sky"])


def test_records(register, tmp_path):
    register(content())
    (record,) = DatasetCatalog.get("test_panoptic")
    assert record == {
        "file_name": str(tmp_path / "1.jpg"),
        "image_id": 1,
        "height": 10,
        "width": 20,
        "pan_seg_file_name": str(tmp_path / "png" / "1.png"),
        "segments_info": [
            {"id": 5, "category_id": 1, "isthing": True, "iscrowd": 0},
            {"id": 9, "category_id": 2, "isthing": False, "iscrowd": 0},
        ],
    }


def test_nothing_is_read_on_registration(tmp_path):
    register_panoptic_dataset("nowhere", tmp_path, tmp_path, tmp_path / "missing.json")
    try:
        with pytest.raises(UserError, match=r"missing\.json: No such file"):
            _ = MetadataCatalog.get("nowhere").thing_classes
    finally:
        DatasetCatalog.remove("nowhere")
        MetadataCatalog.remove("nowhere")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not a JSON file"),
        (content(categories=CATEGORIES + CATEGORIES[:1]), "two categories have the id 40"),
        (content(categories=[{"id": 1, "name": "x"}]), "no field 'isthing'"),
        (content(annotations=[]), "no annotations"),
        (content(images=[{"id": 1, "file_name": "1.jpg", "height": 10}]), "no 'width'"),
        (content(categories=CATEGORIES[1:]), "image 1: segment 9 has category_id 40"),
    ],
)
def test_bad_json_is_one_line_that_names_the_file(register, bad, message):
    register(bad)
    with pytest.raises(UserError, match=message) as error:
        DatasetCatalog.get("test_panoptic")
    assert "panoptic.json" in str(error.value)
    assert "\n" not in str(error.value)
