"""Label spaces told by metadata: ours, and both kinds of Detectron2."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import trainId2label
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from panoptic_fpn_ext import PanopticFPNMapper, add_panoptic_fpn_config
from panoptic_fpn_ext.data.label_space import thing_sem_seg_ids, with_isthing

from .tiny_dataset import CAR, CROWD, PERSON, SKY, TinyDataset

COCO_THINGS = [i for i, category in enumerate(COCO_CATEGORIES) if category["isthing"]]
CITYSCAPES_THINGS = [i for i in range(19) if trainId2label[i].hasInstances]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco_2017_val_panoptic_fpn", dict.fromkeys(range(80), 0)),
        ("coco_2017_val_panoptic_separated", dict.fromkeys(range(80), 0)),
        ("coco_2017_val_panoptic_stuffonly", dict.fromkeys(range(80), 0)),
        ("coco_2017_val", dict.fromkeys(range(80), 0)),
        ("coco_2017_val_panoptic", {i: i for i in COCO_THINGS}),
        ("cityscapes_fine_panoptic_fpn_val", dict(enumerate(CITYSCAPES_THINGS))),
        ("cityscapes_fine_panoptic_val", {i: i for i in CITYSCAPES_THINGS}),
        ("cityscapes_fine_sem_seg_val", dict(enumerate(CITYSCAPES_THINGS))),
        ("ade20k_sem_seg_val", {}),
    ],
)
def test_registered_datasets(name, expected):
    assert thing_sem_seg_ids(MetadataCatalog.get(name)) == expected


@pytest.mark.parametrize("label_space", ["separated", "full"])
def test_own_datasets(tmp_path, label_space):
    with TinyDataset(tmp_path / "data").registered(label_space=label_space) as name:
        found = thing_sem_seg_ids(MetadataCatalog.get(name))
    assert found == ({0: 0, 1: 0} if label_space == "separated" else {0: 1, 1: 2})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {}),
        ({"stuff_classes": ["wall", "sky"]}, {}),
        ({"thing_classes": ["cat", "dog"]}, {0: 0, 1: 0}),
        ({"thing_dataset_id_to_contiguous_id": {7: 0}, "stuff_classes": ["a", "b"]}, {0: 0}),
        # A stuff category that has the name of a thing makes no full label space.
        ({"thing_classes": ["window", "cat"], "stuff_classes": ["things", "window"]}, {0: 0, 1: 0}),
        ({"thing_classes": ["cat"], "stuff_classes": ["sky", "cat"]}, {0: 1}),
    ],
)
def test_other_metadata(metadata, expected):
    assert thing_sem_seg_ids(Metadata(name="other", **metadata)) == expected


def test_what_a_segment_says_of_itself_stands():
    segments = [{"category_id": 1, "isthing": False}, {"category_id": 1}, {"category_id": 2}]
    assert [s["isthing"] for s in with_isthing(segments, {1: 0})] == [False, True, False]


@pytest.fixture
def paths_of():
    """A function that says where Detectron2 looks for a dataset; what lies there is removed."""
    made = []

    def paths_of(name):
        metadata = MetadataCatalog.get(name)
        folder = Path(metadata.panoptic_json).parent.parent
        assert not folder.exists()
        made.append(folder)
        return [
            Path(path)
            for path in (metadata.image_root, metadata.panoptic_root, metadata.panoptic_json)
        ]

    yield paths_of
    for folder in made:
        shutil.rmtree(folder)


def mapped(name: str, *, is_train: bool) -> list[dict]:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RANDOM_FLIP = (0,), 0, "none"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    mapper = PanopticFPNMapper(cfg, is_train=is_train)
    return [mapper(record) for record in DatasetCatalog.get(name)]


def test_the_cityscapes_of_detectron2(paths_of, capfd):
    """Its records have no size, and their segments do not say which are things."""
    name = "cityscapes_fine_panoptic_val"
    image_root, panoptic_root, _ = paths_of(name)
    ids = np.zeros((8, 16), np.uint16)
    ids[2:], ids[4:, :8], ids[4:, 8:12], ids[4:, 12:] = 7, 26000, 26, 33000
    train_ids = np.full(ids.shape, 255, np.uint8)
    train_ids[2:], train_ids[4:, :12], train_ids[4:, 12:] = 0, 13, 18
    ground_truth = panoptic_root.parent / "val" / "ulm"
    for folder in (ground_truth, image_root / "ulm"):
        folder.mkdir(parents=True)
    for kind, image in (("instanceIds", ids), ("labelTrainIds", train_ids)):
        Image.fromarray(image).save(ground_truth / f"ulm_000003_000019_gtFine_{kind}.png")
    Image.new("RGB", (16, 8)).save(image_root / "ulm" / "ulm_000003_000019_leftImg8bit.png")
    convert2panoptic(str(panoptic_root.parent), setNames=["val"])

    (record,) = mapped(name, is_train=True)
    np.testing.assert_array_equal(record["sem_seg"], train_ids)
    assert record["instances"].gt_classes.tolist() == [13, 18]
    np.testing.assert_array_equal(record["instances"].gt_masks.tensor, [ids == 26000, ids == 33000])
    (record,) = mapped(name, is_train=False)
    assert (record["height"], record["width"]) == (8, 16)
    assert {s["id"]: (s["category_id"], s["isthing"]) for s in record["segments_info"]} == {
        7: (0, False),
        26: (13, True),
        26000: (13, True),
        33000: (18, True),
    }


def test_the_coco_panoptic_of_detectron2(paths_of, tmp_path):
    name = "coco_2017_val_100_panoptic"
    image_root, panoptic_root, panoptic_json = paths_of(name)
    data = TinyDataset(tmp_path / "data")
    sky, car, person = 187, 3, 1
    for annotation in data.panoptic["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = {3: sky, 7: car, 9: person}[segment["category_id"]]
    data.write()
    shutil.copytree(data.images, image_root)
    shutil.copytree(data.pngs, panoptic_root)
    panoptic_json.parent.mkdir(exist_ok=True)
    shutil.copy(data.panoptic_json, panoptic_json)

    index_of = {category["id"]: i for i, category in enumerate(COCO_CATEGORIES)}
    for record in mapped(name, is_train=True):
        ids = cv2.imread(record["pan_seg_file_name"])[..., ::-1].astype(int) @ (1, 256, 65536)
        expected = np.full(ids.shape, 255)
        for segment_id, category in ((SKY, sky), (CAR, car), (PERSON, person), (CROWD, car)):
            expected[ids == segment_id] = index_of[category]
        np.testing.assert_array_equal(record["sem_seg"], expected)
        assert record["instances"].gt_classes.tolist() == [index_of[car], index_of[person]]
    for record in mapped(name, is_train=False):
        assert record["image"].shape[1:] == (record["height"], record["width"]) == (24, 32)


def test_predicting_needs_no_annotations_but_training_does(tmp_path, shapes):
    (record, *_) = DatasetCatalog.get("shapes_val")
    data = TinyDataset(tmp_path / "data")
    data.panoptic_json.unlink()
    with data.registered() as name:
        cfg = get_cfg()
        add_panoptic_fpn_config(cfg)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        assert "image" in PanopticFPNMapper(cfg, is_train=False)(record)
        with pytest.raises(ValueError, match=r"panoptic\.json: No such file"):
            PanopticFPNMapper(cfg, is_train=True)
