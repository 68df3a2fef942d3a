"""Checks of a whole dataset: planted faults are found, and nothing else."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from panoptic_fpn_ext.data.checks import check_panoptic_dataset
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png
from panoptic_fpn_ext.data.targets import segment_boxes

from .tiny_dataset import CAR, CROWD, PERSON, SKY, TinyDataset

NUM_IMAGES = 22
Planted = set[tuple[str, object, object]]


def plant_twenty(data: TinyDataset) -> Planted:
    """Twenty faults, in an image each where they lie in one; kind, image id and segment id."""
    planted = []

    def plant(kind, image_id, segment_id=None):
        planted.append((kind, image_id, segment_id))

    def png(image_id, change):
        ids = read_panoptic_png(data.png(image_id))
        write_panoptic_png(data.png(image_id), change(ids))

    content = data.png(1).read_bytes()
    data.png(1).write_bytes(content[:-200])
    plant("unreadable-png", 1)
    data.png(2).unlink()
    plant("unreadable-png", 2)
    Image.open(data.png(3)).convert("L").save(data.png(3))
    plant("unreadable-png", 3)
    png(4, lambda ids: np.pad(ids, ((0, 1), (0, 0))))
    plant("wrong-size", 4)
    png(5, lambda ids: np.where(np.arange(ids.size).reshape(ids.shape) == 700, 12345, ids))
    plant("id-not-in-json", 5, 12345)
    data.annotation(6)["segments_info"].append({"id": 999, "category_id": 7})
    plant("id-not-in-png", 6, 999)
    data.segment(7, CAR)["area"] += 1
    plant("wrong-area", 7, CAR)
    data.segment(8, PERSON)["bbox"][2] -= 1
    plant("wrong-bbox", 8, PERSON)
    data.segment(9, SKY)["category_id"] = 1000
    plant("unknown-category", 9, SKY)
    (data.images / "10.jpg").unlink()
    plant("unreadable-image", 10)
    image = (data.images / "11.jpg").read_bytes()
    (data.images / "11.jpg").write_bytes(image[: len(image) // 2])
    plant("unreadable-image", 11)
    Image.new("RGB", (40, 24)).save(data.images / "12.jpg")
    plant("wrong-size", 12)
    data.annotation(13)["segments_info"].append(dict(data.segment(13, CAR)))
    plant("duplicate-segment", 13, CAR)
    data.segment(14, CROWD)["iscrowd"] = 7
    plant("wrong-value", 14, CROWD)
    del data.segment(15, CAR)["category_id"]
    plant("missing-field", 15, CAR)
    data.panoptic["annotations"].append({**data.annotation(16), "image_id": 600})
    plant("unknown-image", 600)
    data.panoptic["annotations"].append(data.annotation(17))
    plant("duplicate-annotation", 17)
    data.panoptic["images"].append(data.image(18))
    plant("duplicate-image", 18)
    data.panoptic["images"].append({**data.image(19), "id": 700})
    plant("missing-annotation", 700)
    data.panoptic["categories"] = [
        *data.panoptic["categories"],
        {"id": 50, "name": "sky", "isthing": 0},
    ]
    plant("duplicate-category-name", None)
    assert len(set(planted)) == 20
    return set(planted)


@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_planted_faults_and_no_others(tmp_path, workers):
    data = TinyDataset(tmp_path / "data", NUM_IMAGES)
    planted = plant_twenty(data)
    data.write()
    faults = check_panoptic_dataset(**data.paths(), workers=workers).faults
    assert sorted(map(repr, planted)) == sorted(
        repr((fault.kind, fault.image_id, fault.segment_id)) for fault in faults
    )


def test_a_sound_dataset_has_none(shapes):
    report = check_panoptic_dataset(
        image_root=shapes / "val",
        panoptic_root=shapes / "panoptic_val",
        panoptic_json=shapes / "annotations" / "panoptic_val.json",
        instances_json=shapes / "annotations" / "instances_val.json",
    )
    assert report.faults == []
    assert report.statistics.images == 6


def test_workers_begin_where_opencv_has_computed_in_threads(tmp_path):
    """Which a forked process does not have."""
    picture = np.zeros((2000, 2000, 3), np.uint8)
    for _ in range(3):
        cv2.GaussianBlur(picture, (9, 9), 2)
    data = TinyDataset(tmp_path)
    assert check_panoptic_dataset(**data.paths(), workers=1).faults == []


def test_segments_without_an_id_are_faults_of_the_json_only(tmp_path):
    data = TinyDataset(tmp_path / "data")
    data.annotation(1)["segments_info"] += [{"category_id": 7}, {"id": 0, "category_id": 7}]
    data.write()
    faults = check_panoptic_dataset(**data.paths()).faults
    assert [(fault.kind, fault.segment_id) for fault in faults] == [
        ("missing-field", None),
        ("wrong-value", 0),
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_segment_boxes_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 6, (rng.integers(1, 9), rng.integers(1, 9)))
    image = np.kron(image, np.ones((2, 3), int))[:, :: rng.choice([-1, 1])]
    segments = segment_boxes(image)
    assert segments.values.tolist() == sorted(set(image.ravel().tolist()))
    for value, area, box in zip(*segments, strict=True):
        ys, xs = np.nonzero(image == value)
        assert area == len(ys)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
