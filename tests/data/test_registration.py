"""Registering panoptic datasets: categories, label spaces, records."""

import copy
import json
import multiprocessing
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json

from panoptic_fpn_ext import (
    PanopticFPNMapper,
    UserError,
    add_panoptic_fpn_config,
    register_panoptic_dataset,
)
from panoptic_fpn_ext.data import register_datasets_of_config
from panoptic_fpn_ext.data.label_space import thing_sem_seg_ids

from .tiny_dataset import TinyDataset

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
    for name in set(names):
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


def test_a_stuff_category_with_id_0(register):
    """Which is that of "things" otherwise."""
    metadata = register(content(categories=[{**CATEGORIES[0], "id": 0}, CATEGORIES[1]]))
    assert metadata.stuff_classes == ["things", "sky"]
    assert metadata.stuff_dataset_id_to_contiguous_id == {-1: 0, 0: 1}


def test_a_stuff_category_called_things(register):
    """Which is the name of all things together otherwise."""
    called = [{**CATEGORIES[0], "name": "things"}, CATEGORIES[1]]
    metadata = register(content(categories=called))
    assert metadata.stuff_classes == ["all things", "things"]
    assert metadata.stuff_dataset_id_to_contiguous_id == {0: 0, 40: 1}
    assert thing_sem_seg_ids(metadata) == {0: 0}
    called.append({**CATEGORIES[2], "name": "all things"})
    classes = register(content(categories=called), name="both").stuff_classes
    assert classes == ["all all things", "all things", "things"]
    full = register(content(categories=called), name="full", label_space="full")
    assert full.stuff_classes == ["all things", "car", "things"]
    called[:] = [CATEGORIES[0], {**CATEGORIES[1], "name": "things"}]
    assert register(content(categories=called), name="thing").stuff_classes == ["things", "sky"]


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
        "sem_seg_file_name": f"panoptic-sem-seg://5=0,9=2/{tmp_path}/png/1.png",
    }


def test_nothing_is_read_on_registration(tmp_path):
    path = tmp_path / "missing.json"
    register_panoptic_dataset("nowhere", tmp_path, tmp_path, path)
    try:
        metadata = MetadataCatalog.get("nowhere")
        assert pickle.loads(pickle.dumps(metadata.as_dict())) == metadata.as_dict()
        with pytest.raises(UserError, match=r"missing\.json: No such file"):
            _ = metadata.thing_classes
        path.write_text(json.dumps(content()))
        assert metadata.thing_classes == ["car", "person"]
        assert metadata.as_dict()["thing_classes"] == ["car", "person"]
    finally:
        DatasetCatalog.remove("nowhere")
        MetadataCatalog.remove("nowhere")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not a JSON file"),
        (
            content(categories=CATEGORIES + CATEGORIES[:1]),
            r"categories\[0\] and \[4\] have the same id 40",
        ),
        (content(categories=[{"id": 1, "name": "x"}]), "no field 'isthing'"),
        (content(annotations=[]), "annotations is an empty list"),
        (content(images=[{"id": 1, "file_name": "1.jpg", "height": 10}]), "no field 'width'"),
        (content(categories=CATEGORIES[1:]), "image 1: segment 9: category_id 40 is not among"),
    ],
)
def test_bad_json_is_one_line_that_names_the_file(register, bad, message):
    register(bad)
    with pytest.raises(UserError, match=message) as error:
        DatasetCatalog.get("test_panoptic")
    assert "panoptic.json" in str(error.value)
    assert "\n" not in str(error.value)


def below(folder: str) -> Callable[[dict], str]:
    return lambda image: f"{folder}/{image['file_name']}"


def test_the_same_registration_again_changes_nothing(register, tmp_path):
    arguments = {"categories": CATEGORIES, "label_space": "full", "color_map": [1]}
    metadata = register(content(), image_file_name=below("a"), **arguments)
    metadata.set(note="mine")
    loader = DatasetCatalog["test_panoptic"]
    register(  # paths as text, and a function of the same content
        content(),
        **{**arguments, "categories": json.loads(json.dumps(CATEGORIES))},
        image_file_name=below("a"),
        evaluators=("panoptic_seg", "sem_seg", "instances"),
    )
    path = str(tmp_path / "panoptic.json")
    with pytest.raises(UserError, match="label_space 'full', not 'separated'"):
        register_panoptic_dataset("test_panoptic", str(tmp_path), f"{tmp_path}/png", path)
    assert MetadataCatalog.get("test_panoptic") is metadata
    assert DatasetCatalog["test_panoptic"] is loader
    assert metadata.note == "mine"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"image_root": "b"}, "image_root 'a', not 'b'"),
        ({"panoptic_root": None}, "panoptic_root 'p', not None"),
        ({"panoptic_json": "q"}, "panoptic_json 'j', not 'q'"),
        ({"instances_json": "i"}, "instances_json None, not 'i'"),
        ({"label_space": "full"}, "label_space 'separated', not 'full'"),
        ({"categories": CATEGORIES}, "categories"),  # too many to list
        ({"evaluators": ["sem_seg"]}, r"evaluators \(.*\), not \('sem_seg',\)"),
        ({"image_file_name": below("b")}, "image_file_name <.*>, not <.*>"),
        ({"image_file_name": lambda image: "b"}, "image_file_name <.*>, not <.*>"),
        ({"gt_dir": "g"}, "gt_dir None, not 'g'"),
    ],
)
def test_another_of_the_same_name_is_refused(changes, difference):
    arguments = {"image_root": "a", "panoptic_root": "p", "panoptic_json": "j"}
    extra = {"image_file_name": below("a")}
    register_panoptic_dataset("taken", **arguments, **extra)
    advice = r"choose another name, or call DatasetCatalog.remove\('taken'\) first"
    try:
        message = f"^dataset taken: registered already with {difference}: {advice}$"
        with pytest.raises(UserError, match=message):
            register_panoptic_dataset("taken", **{**arguments, **extra, **changes})
        DatasetCatalog.remove("taken")
        register_panoptic_dataset("taken", **{**arguments, **changes})
    finally:
        DatasetCatalog.remove("taken")
        MetadataCatalog.remove("taken")


def test_a_name_of_detectron2_is_refused():
    name = "coco_2017_val_panoptic"
    with pytest.raises(UserError, match=f"dataset {name}: another one is registered by this name"):
        register_panoptic_dataset(name, "a", "b", "c")


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda metadata: pickle.loads(pickle.dumps(metadata)),
}


@pytest.mark.parametrize("resolved", [False, True])
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_metadata_is_copied(register, make_copy, resolved):
    metadata = register(content(), note=["a"])
    if resolved:
        assert metadata.thing_classes
    copied = make_copy(metadata)
    assert copied == metadata
    assert type(copied) is type(metadata)
    assert copied.as_dict() == metadata.as_dict()
    assert ("thing_classes" in metadata.as_dict()) == resolved  # nothing was read
    copied.set(mine=1)
    assert "mine" not in metadata.as_dict()
    assert metadata.json_file == copied.json_file
    assert copied.stuff_classes == metadata.stuff_classes == ["things", "road", "sky"]
    assert copied.as_dict() == {**metadata.as_dict(), "mine": 1}
    assert not hasattr(copied, "absent")
    assert copied.as_dict()["note"] == ["a"]
    if make_copy is not copy.copy:
        copied.note.append("b")
        copied.thing_classes.append("b")
        assert (metadata.note, metadata.thing_classes) == (["a"], ["car", "person"])


def stuff_classes(metadata: Metadata) -> list[str]:
    return metadata.stuff_classes


def test_metadata_goes_to_a_spawned_process(register):
    metadata = register(content())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(stuff_classes, (metadata,)) == ["things", "road", "sky"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_instances_equal_those_of_detectron2(shapes, split):
    json_file = str(shapes / "annotations" / f"instances_{split}.json")
    expected = load_coco_json(json_file, "", "as_detectron2_loads_it")
    MetadataCatalog.remove("as_detectron2_loads_it")
    records = {r["image_id"]: r for r in DatasetCatalog.get(f"shapes_{split}")}
    for record in expected:
        assert records[record["image_id"]]["annotations"] == record["annotations"]


def test_masks_of_every_kind_equal_those_of_detectron2(data):
    triangle, line = [1, 2, 9, 2, 5, 8], [1, 2, 9, 2]
    segmentations = [
        *([triangle], [line, triangle], [line], [triangle[:5], triangle]),
        {"size": [24, 32], "counts": [700, 20, 48]},
    ]
    annotation = data.instances["annotations"][0]
    data.instances["annotations"] = [
        {**annotation, "segmentation": segmentation, "id": k}
        for k, segmentation in enumerate(segmentations)
    ]
    data.instances["categories"] = [c for c in data.panoptic["categories"] if c["isthing"]]
    data.write()
    expected = load_coco_json(str(data.instances_json), "", "as_detectron2_loads_it")
    MetadataCatalog.remove("as_detectron2_loads_it")
    with data.registered(instances=True) as name:
        records = DatasetCatalog.get(name)
    assert [r["annotations"] for r in records] == [r["annotations"] for r in expected]
    assert len(records[0]["annotations"]) == len(segmentations) - 1


def test_keypoints_equal_those_of_detectron2(data):
    """From the JSON, and through both mappers."""
    rng = np.random.default_rng(0)
    for annotation in data.instances["annotations"]:
        keypoints = np.stack([*rng.integers(0, (24, 32), (3, 2)).T, rng.integers(0, 3, 3)], axis=1)
        annotation["keypoints"] = keypoints.reshape(-1).tolist()
    data.instances["categories"] = [c for c in data.panoptic["categories"] if c["isthing"]]
    data.write()
    names = {
        "keypoint_names": ["nose", "left ear", "right ear"],
        "keypoint_flip_map": [("left ear", "right ear")],
    }
    expected = load_coco_json(str(data.instances_json), "", "as_detectron2_loads_it")
    MetadataCatalog.remove("as_detectron2_loads_it")
    with data.registered(instances=True, **names) as name:
        records = DatasetCatalog.get(name)
        cfg = get_cfg()
        add_panoptic_fpn_config(cfg)
        cfg.DATASETS.TRAIN = (name,)
        cfg.MODEL.KEYPOINT_ON, cfg.INPUT.MIN_SIZE_TRAIN = True, (36,)
        mappers = PanopticFPNMapper(cfg), DatasetMapper(cfg)
        cfg.MODEL.KEYPOINT_ON = False
        assert not PanopticFPNMapper(cfg)(records[0])["instances"].has("gt_keypoints")
    assert [r["annotations"] for r in records] == [r["annotations"] for r in expected]
    for seed in range(4):
        for record in records:
            mapped = []
            for mapper in mappers:
                np.random.seed(seed)
                mapped.append(mapper(record)["instances"].gt_keypoints.tensor)
            torch.testing.assert_close(*mapped)
            assert mapped[0].shape == (2, 3, 3)


def dataset_in_config(data, **changes):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    arguments = {"name": "in_config", **{k: str(v) for k, v in data.paths().items()}, **changes}
    cfg.merge_from_list(["DATASETS.PANOPTIC", str([arguments])])
    return cfg


@pytest.fixture
def data(tmp_path):
    yield TinyDataset(tmp_path / "data")
    if "in_config" in DatasetCatalog.list():
        DatasetCatalog.remove("in_config")
        MetadataCatalog.remove("in_config")


def test_datasets_of_a_config(data, tmp_path):
    cfg = dataset_in_config(data, label_space="full")
    register_datasets_of_config(cfg)
    register_datasets_of_config(cfg)  # again, as each process does
    assert len(DatasetCatalog.get("in_config")) == 2
    assert MetadataCatalog.get("in_config").thing_sem_seg_ids == (1, 2)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_panoptic_fpn_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.DATASETS.PANOPTIC == cfg.DATASETS.PANOPTIC


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("shapes", r"DATASETS.PANOPTIC\[0\]: 'shapes' is not a dict with name, image_root"),
        ({"name": "x"}, r"DATASETS.PANOPTIC\[0\]: no 'image_root'; needed are name, image_root"),
        ({"image_dir": "x"}, r"unknown 'image_dir'; allowed are name, image_root"),
        ({"label_space": "half"}, r"label_space 'half' is not one of"),
        (
            {"name": "shapes_val"},
            r"DATASETS.PANOPTIC\[0\]: dataset shapes_val: registered already with image_root '",
        ),
    ],
)
def test_mistakes_in_datasets_of_a_config(data, entry, message):
    cfg = dataset_in_config(data)
    if isinstance(entry, dict) and entry != {"name": "x"}:
        entry = {**cfg.DATASETS.PANOPTIC[0], **entry}
    cfg.DATASETS.PANOPTIC = [entry]
    with pytest.raises(UserError, match=message):
        register_datasets_of_config(cfg)
