"""Broken datasets: one line that names file and field, from training and from the checks alike."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from PIL import Image

from panoptic_fpn_ext import PanopticFPNMapper, UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.data.checks import check_panoptic_dataset
from panoptic_fpn_ext.data.coco_json import Fault
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png

from .tiny_dataset import CAR, CATEGORIES, CROWD, PERSON, SKY, TinyDataset

pytestmark = pytest.mark.faults

Break = Callable[[TinyDataset], None]


def train(data: TinyDataset, instances: bool) -> None:
    """What training does with the dataset, before the network sees it."""
    with data.registered(instances) as name:
        cfg = get_cfg()
        add_panoptic_fpn_config(cfg)
        cfg.MODEL.MASK_ON = True
        cfg.DATASETS.TRAIN = (name,)
        cfg.INPUT.MIN_SIZE_TRAIN = (24,)
        mapper = PanopticFPNMapper(cfg, is_train=True)
        for record in DatasetCatalog.get(name):
            mapper(record)


def truncate(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def save_png(mode: str) -> Break:
    def save(data: TinyDataset) -> None:
        Image.open(data.png(1)).convert(mode).save(data.png(1))

    return save


def swap_red_and_blue(data: TinyDataset) -> None:
    cv2.imwrite(str(data.png(1)), cv2.imread(str(data.png(1)))[..., ::-1])


def change_image(**fields) -> Break:
    return lambda data: data.image(1).update(fields)


def change_segment(**fields) -> Break:
    return lambda data: data.segment(1, CAR).update(fields)


def drop(get: Callable[[TinyDataset], dict], field: str) -> Break:
    return lambda data: get(data).pop(field)


def change_categories(*categories: dict) -> Break:
    return lambda data: data.panoptic.update(categories=list(categories))


def resize_png(data: TinyDataset) -> None:
    write_panoptic_png(data.png(1), read_panoptic_png(data.png(1))[:20])


def paint(segment_id: int) -> Break:
    """Paint a corner of the PNG of image 1 with an id that its segments lack."""

    def paint(data: TinyDataset) -> None:
        ids = read_panoptic_png(data.png(1))
        ids[-3:, -3:] = segment_id
        write_panoptic_png(data.png(1), ids)

    return paint


def sixteen_bit(data: TinyDataset) -> None:
    cv2.imwrite(str(data.png(1)), np.zeros((24, 32, 3), np.uint16))


def wide_image(mode: str, kind: type) -> Break:
    """Of more than 8 bits; PNG knows 16 alone."""

    def save(data: TinyDataset) -> None:
        image = Image.fromarray(np.full((24, 32), 1000, kind))
        image.save(data.images / "1.jpg", format="PNG" if mode == "I;16" else "TIFF")

    return save


def two_annotations(data: TinyDataset) -> None:
    data.panoptic["annotations"].append(data.annotation(1))


CASES: dict[str, tuple[Break, str]] = {
    "truncated PNG": (lambda d: truncate(d.png(1)), r"panoptic/1\.png: damaged or truncated"),
    "empty PNG": (lambda d: d.png(1).write_bytes(b""), r"panoptic/1\.png: not a PNG"),
    "missing PNG": (lambda d: d.png(1).unlink(), r"panoptic/1\.png: .*No such file"),
    "palette PNG": (save_png("P"), r"panoptic/1\.png: 8-bit palette"),
    "grey PNG": (save_png("L"), r"panoptic/1\.png: 8-bit grey"),
    "16-bit PNG": (sixteen_bit, r"panoptic/1\.png: 16-bit RGB"),
    "PNG of another size": (resize_png, r"panoptic/1\.png: .*32x20.*32x24"),
    "id missing in the JSON": (paint(77), r"panoptic/1\.png: .*77.*segments_info"),
    "truncated image": (lambda d: truncate(d.images / "1.jpg"), r"images/1\.jpg: cannot read"),
    "missing image": (
        lambda d: (d.images / "1.jpg").unlink(),
        r"images/1\.jpg: cannot read the image: No such file",
    ),
    "not an image": (
        lambda d: (d.images / "1.jpg").write_text("<html>"),
        r"images/1\.jpg: cannot read",
    ),
    "16-bit grey image": (wide_image("I;16", np.uint16), r"images/1\.jpg: pixels of mode I;16"),
    "32-bit image": (wide_image("I", np.int32), r"images/1\.jpg: pixels of mode I,"),
    "image of floating point": (wide_image("F", np.float32), r"images/1\.jpg: pixels of mode F,"),
    "category 0": (
        change_segment(category_id=0),
        r"image 1: segment 300: category_id 0 is not among the categories",
    ),
    "image of another size": (change_image(width=31), r"images/1\.jpg: 32x24 .*31x24"),
    "no height": (drop(lambda d: d.image(1), "height"), r"image 1: images\[0\]: no .*'height'"),
    "height in words": (change_image(height="24"), r"image 1: .*height is '24', expected a pos"),
    "negative width": (change_image(width=-32), r"image 1: .*width is -32, expected a positive"),
    "no file name": (drop(lambda d: d.annotation(1), "file_name"), r"image 1: .*no .*'file_name'"),
    "no segments": (
        drop(lambda d: d.annotation(1), "segments_info"),
        r"image 1: annotations\[0\]: no field 'segments_info'",
    ),
    "no category of a segment": (
        drop(lambda d: d.segment(1, CAR), "category_id"),
        r"image 1: segment 300: .*no field 'category_id'",
    ),
    "unknown category": (
        change_segment(category_id=8),
        r"image 1: segment 300: category_id 8 is not among",
    ),
    "category missing": (
        change_categories(*CATEGORIES[:2]),
        r"image 1: segment 70000: category_id 9 is not among the categories",
    ),
    "id 0": (change_segment(id=0), r"image 1: segment 0: .*id is 0, expected an integer from 1"),
    "id in words": (change_segment(id="300"), r"image 1: segment 300: .*id is '300', expected"),
    "id that is true": (change_segment(id=True), r"image 1: .*id is True, expected an integer"),
    "id beyond 24 bits": (change_segment(id=2**24), r"segment 16777216: .*expected .*16777215"),
    "duplicate segment ids": (change_segment(id=PERSON), r"segment 70000: two segments have"),
    "crowd neither 0 nor 1": (change_segment(iscrowd=2), r"segment 300: .*iscrowd is 2, expected"),
    "duplicate image ids": (change_image(id=2), r"image 2: two images have this id"),
    "two annotations": (two_annotations, r"image 1: has two annotations"),
    "unknown image": (
        lambda d: d.annotation(1).update(image_id=40),
        r"image 40: annotations\[0\]: not in images",
    ),
    "empty image list": (
        lambda d: d.panoptic.update(images=[], annotations=[]),
        r"panoptic\.json: images is an empty list",
    ),
    "no annotations": (
        lambda d: d.panoptic.update(annotations=[]),
        r"panoptic\.json: annotations is an empty list",
    ),
    "no list of images": (drop(lambda d: d.panoptic, "images"), r"json: no field 'images'"),
    "no categories": (drop(lambda d: d.panoptic, "categories"), r"json: no categories"),
    "duplicate category ids": (
        change_categories(*CATEGORIES, {"id": 7, "name": "bus", "isthing": 1}),
        r"panoptic\.json: categories\[1\] and \[3\] have the same id 7",
    ),
    "equal names": (
        change_categories(*CATEGORIES, {"id": 8, "name": "car", "isthing": 1}),
        r"panoptic\.json: categories\[1\] and \[3\] have the same name 'car'",
    ),
    "isthing missing": (
        change_categories({"id": 3, "name": "sky"}, *CATEGORIES[1:]),
        r"panoptic\.json: categories\[0\]: no field 'isthing'",
    ),
    "colour in words": (
        change_categories({**CATEGORIES[0], "color": "blue"}, *CATEGORIES[1:]),
        r"panoptic\.json: categories\[0\]: color is 'blue', expected three integers",
    ),
    "more categories than a byte holds": (
        change_categories(
            *CATEGORIES, *({"id": 10 + k, "name": f"{k}", "isthing": 0} for k in range(300))
        ),
        r"panoptic\.json: 303 categories, at most 254",
    ),
}
CASES_OF_INSTANCES: dict[str, tuple[Break, str]] = {
    "unknown category of an instance": (
        lambda d: d.instances["annotations"][0].update(category_id=3),
        r"instances\.json: image 1: annotations\[0\]: category_id 3 is not a thing category",
    ),
    "instance without a box": (
        drop(lambda d: d.instances["annotations"][0], "bbox"),
        r"instances\.json: image 1: annotations\[0\]: no field 'bbox'",
    ),
    "box of three numbers": (
        lambda d: d.instances["annotations"][0].update(bbox=[1, 2, 3]),
        r"instances\.json: image 1: annotations\[0\]: bbox is \[1, 2, 3\], expected \[x, y, w, h\]",
    ),
    "box that is not finite": (
        lambda d: d.instances["annotations"][0].update(bbox=[0, 0, float("inf"), 1]),
        r"instances\.json: image 1: annotations\[0\]: bbox is \[0, 0, inf, 1\], expected \[x, y",
    ),
    "instance of an unknown image": (
        lambda d: d.instances["annotations"][0].update(image_id=50),
        r"instances\.json: image 50: annotations\[0\]: not in its images",
    ),
    "image id that is a list": (
        lambda d: d.instances.update(images=[{"id": [1]}, {"id": 2}]),
        r"instances\.json: image 1: annotations\[0\]: not in its images",
    ),
    "RLE of another size": (
        lambda d: d.instances["annotations"][0].update(
            segmentation={"size": [24, 30], "counts": [720]}
        ),
        r"instances\.json: image 1: .*segmentation is of size \[24, 30\], expected \[24, 32\]",
    ),
    "a panoptic PNG written as BGR": (
        swap_red_and_blue,
        r"1\.png: .*segment.* \(red and blue are swapped: OpenCV takes BGR",
    ),
    "points in pairs": (
        lambda d: d.instances["annotations"][0].update(segmentation=[[[1, 1], [9, 1], [5, 9]]]),
        r"instances\.json: image 1: .*, expected a list of polygons, .* \[\[x, y, x, y, \.\.\.\]\]",
    ),
    "one polygon, not in a list": (
        lambda d: d.instances["annotations"][0].update(segmentation=[1, 1, 9, 1, 5, 9]),
        r"instances\.json: image 1: .*, expected a list of polygons, .* \[\[x, y, x, y, \.\.\.\]\]",
    ),
    "no mask, but others have one": (
        lambda d: d.instances["annotations"][0].update(segmentation=[]),
        r"instances\.json: image 1: annotations\[0\]: no mask in segmentation, but others have one",
    ),
    "polygon in words": (
        lambda d: d.instances["annotations"][0].update(segmentation=[["a"] * 6]),
        r"instances\.json: image 1: .*, expected a list of polygons, each a list of numbers",
    ),
    "keypoints without their visibility": (
        lambda d: d.instances["annotations"][0].update(keypoints=[1, 2]),
        r"instances\.json: image 1: annotations\[0\]: keypoints is \[1, 2\], expected \[x, y, vis",
    ),
    "other images": (
        lambda d: d.instances.update(images=[{"id": 99}]),
        r"instances\.json: none of its image ids is in the panoptic JSON",
    ),
}


@pytest.mark.parametrize(
    ("change", "message", "instances"),
    [(*case, False) for case in CASES.values()] + [(*c, True) for c in CASES_OF_INSTANCES.values()],
    ids=[*CASES, *CASES_OF_INSTANCES],
)
def test_training_and_checks_name_file_and_field(tmp_path, change, message, instances):
    data = TinyDataset(tmp_path / "data")
    change(data)
    data.write()
    with pytest.raises(UserError, match=message) as error:
        train(data, instances)
    assert "\n" not in str(error.value)
    found = check_panoptic_dataset(**data.paths(instances)).faults
    assert any(said_by(fault, message) for fault in found), [str(f) for f in found]


def said_by(fault: Fault, message: str) -> bool:
    """Whether a fault says the same; of a file, the checks name the image id too."""
    without_id = str(dataclasses.replace(fault, image_id=None))
    return bool(re.search(message, str(fault)) or re.search(message, without_id))


@pytest.mark.parametrize("which", ["panoptic", "instances"])
@pytest.mark.parametrize("content", ["", "{", '{"images": [{"id": 1', "[" * 100_000, "\x00"])
def test_a_json_cut_off(tmp_path, which, content):
    data = TinyDataset(tmp_path / "data")
    (data.root / f"{which}.json").write_text(content)
    message = rf"{which}\.json: not a JSON file, or cut off"
    with pytest.raises(UserError, match=message):
        train(data, instances=True)
    faults = check_panoptic_dataset(**data.paths(instances=True)).faults
    assert [f.kind for f in faults] == ["unreadable-json"]
    assert said_by(faults[0], message)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', '{"images": 3}'])
def test_a_json_of_something_else(tmp_path, content):
    data = TinyDataset(tmp_path / "data")
    data.panoptic_json.write_text(content)
    with pytest.raises(UserError, match=r"panoptic\.json: "):
        train(data, instances=False)
    assert check_panoptic_dataset(**data.paths(instances=True)).faults


def test_a_segment_without_pixels_is_a_fault_that_does_no_harm(tmp_path):
    data = TinyDataset(tmp_path / "data")
    data.annotation(1)["segments_info"].append({"id": 99, "category_id": 7, "iscrowd": 0})
    data.write()
    train(data, instances=False)
    (fault,) = check_panoptic_dataset(**data.paths()).faults
    assert (fault.kind, fault.image_id, fault.segment_id) == ("id-not-in-png", 1, 99)
    assert "panoptic.json: image 1: segment 99: in segments_info" in str(fault)


def non_ascii(data: TinyDataset) -> None:
    (data.images / "1.jpg").rename(data.images / "Straße 東京.jpg")
    data.png(1).rename(data.pngs / "Straße 東京.png")
    data.image(1)["file_name"] = "Straße 東京.jpg"
    data.annotation(1)["file_name"] = "Straße 東京.png"
    data.panoptic["categories"] = [{**CATEGORIES[0], "name": "空"}, *CATEGORIES[1:]]


def absolute_and_relative(data: TinyDataset) -> None:
    (data.root / "elsewhere").mkdir()
    moved = (data.images / "1.jpg").rename(data.root / "elsewhere" / "1.jpg")
    data.image(1)["file_name"] = str(moved)
    (data.pngs / "sub").mkdir()
    data.png(2).rename(data.pngs / "sub" / "2.png")
    data.annotation(2)["file_name"] = "sub/2.png"


def only_a_crowd(data: TinyDataset) -> None:
    ids = read_panoptic_png(data.png(1))
    write_panoptic_png(data.png(1), np.where(ids == CROWD, CROWD, 0))
    data.annotation(1)["segments_info"] = [data.segment(1, CROWD)]
    data.instances["annotations"] = [
        {**a, "iscrowd": 1 if a["image_id"] == 1 else 0} for a in data.instances["annotations"]
    ]


def rgba(data: TinyDataset) -> None:
    Image.open(data.png(1)).convert("RGBA").save(data.png(1))
    picture = Image.open(data.images / "1.jpg").convert("RGBA")
    picture.save(data.images / "1.png")
    data.image(1)["file_name"] = "1.png"


def all_void(data: TinyDataset) -> None:
    write_panoptic_png(data.png(1), np.zeros((24, 32), int))
    data.annotation(1)["segments_info"] = []
    data.instances["annotations"] = [a for a in data.instances["annotations"] if a["image_id"] > 1]


def text_ids(data: TinyDataset) -> None:
    for entry in data.panoptic["images"]:
        entry["id"] = f"image_{entry['id']}"
    for entry in (*data.panoptic["annotations"], *data.instances["annotations"]):
        entry["image_id"] = f"image_{entry['image_id']}"


def at_the_limits(data: TinyDataset) -> None:
    ids = read_panoptic_png(data.png(1))
    write_panoptic_png(data.png(1), np.where(ids == CAR, 2**24 - 1, ids))
    data.segment(1, CAR)["id"] = 2**24 - 1
    more = ({"id": 10 + k, "name": f"{k}", "isthing": k % 2} for k in range(254 - len(CATEGORIES)))
    data.panoptic["categories"] = [*CATEGORIES, *more]


def a_part_of_the_images(data: TinyDataset) -> None:
    data.instances["images"] = [*data.panoptic["images"], {"id": 3, "height": 1, "width": 1}]
    extra = {"image_id": 3, "category_id": 7, "bbox": [0, 0, 1, 1], "segmentation": []}
    data.instances["annotations"].append(extra)


@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        non_ascii,
        absolute_and_relative,
        only_a_crowd,
        rgba,
        all_void,
        text_ids,
        at_the_limits,
        a_part_of_the_images,
    ],
)
def test_unusual_datasets_that_work(tmp_path, change, instances):
    data = TinyDataset(tmp_path / "data")
    change(data)
    data.write()
    train(data, instances)
    assert check_panoptic_dataset(**data.paths(instances)).faults == []


def test_statistics(tmp_path):
    data = TinyDataset(tmp_path / "data")
    found = check_panoptic_dataset(**data.paths()).statistics
    assert (found.images, found.pixels, found.void_pixels) == (2, 2 * 24 * 32, 2 * 8 * 32)
    assert found.segments == {"sky": 2, "car": 2, "person": 2}
    assert found.crowds == {"car": 2}
    assert found.crowd_pixels == 2 * 60
    assert sum(found.category_pixels.values()) == found.pixels - found.void_pixels
    assert found.category_pixels["sky"] == 2 * data.segment(1, SKY)["area"]


class _Faulty(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: int) -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise UserError("a.png: broken") from error


def test_errors_of_worker_processes_are_still_one_line():
    with pytest.raises(UserError) as error:
        list(torch.utils.data.DataLoader(_Faulty(), num_workers=1))
    assert str(error.value) == "a.png: broken"
    assert str(pickle.loads(pickle.dumps(error.value))) == "a.png: broken"
