"""The mapper: records to model inputs."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from panoptic_fpn_ext import PanopticFPNMapper, UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png

from .tiny_dataset import SIZE, TinyDataset


@pytest.fixture
def cfg(shapes):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.DATASETS.TRAIN = ("shapes_train",)
    return cfg


@pytest.fixture
def record(shapes):
    """One with things and crowds, if there is one."""
    return max(DatasetCatalog.get("shapes_train"), key=lambda r: len(r["segments_info"]))


@pytest.fixture
def tiny_record(tmp_path):
    """One whose image is no square."""
    with TinyDataset(tmp_path / "data", 1).registered() as name:
        return DatasetCatalog.get(name)[0]


def test_training_inputs(cfg, record):
    before = copy.deepcopy(record)
    mapped = PanopticFPNMapper(cfg, is_train=True)(record)
    assert record == before
    assert mapped["image"].shape == (3, 96, 96)
    assert mapped["image"].dtype == torch.uint8
    assert mapped["sem_seg"].shape == (96, 96)
    assert mapped["sem_seg"].dtype == torch.int64
    instances = mapped["instances"]
    assert instances.image_size == (96, 96)
    assert len(instances) == sum(s["isthing"] and not s["iscrowd"] for s in record["segments_info"])
    # Things are class 0 of the semantic map, wherever an instance is.
    covered = instances.gt_masks.tensor.any(dim=0)
    assert (mapped["sem_seg"][covered] == 0).float().mean() > 0.95


def test_instances_from_the_panoptic_png_equal_those_of_the_instances_json(cfg, record):
    mapper = PanopticFPNMapper(cfg, is_train=True)
    from_json = mapper(record)["instances"]
    without = {k: v for k, v in record.items() if k != "annotations"}
    from_png = mapper(without)["instances"]
    assert sorted(from_png.gt_classes.tolist()) == sorted(from_json.gt_classes.tolist())
    for box, category in zip(from_json.gt_boxes.tensor, from_json.gt_classes, strict=True):
        same = from_png.gt_boxes.tensor[from_png.gt_classes == category]
        assert (same - box).abs().amax(dim=1).min() <= 2


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**31),
    num_instances=st.integers(0, 4),
    mask_format=st.sampled_from(["polygon", "bitmask"]),
    image_format=st.sampled_from(["BGR", "RGB", "L"]),
    flip=st.sampled_from(["none", "horizontal", "vertical"]),
    crop=st.booleans(),
)
def test_images_and_annotations_are_mapped_as_detectron2_does(
    cfg, tiny_record, seed, num_instances, mask_format, image_format, flip, crop
):
    """Boxes of several modes, several polygons an instance, some beyond the image.

    After a crop boxes are those of what is left of the masks.
    """
    rng = np.random.default_rng(seed)
    cfg = cfg.clone()
    cfg.INPUT.MASK_FORMAT, cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = mask_format, image_format, flip
    annotations = [
        {
            "bbox": rng.uniform(0, 30, 4).round(2).tolist(),
            "bbox_mode": BoxMode.XYWH_ABS if rng.random() < 0.7 else BoxMode.XYXY_ABS,
            "category_id": int(rng.integers(3)),
            "iscrowd": int(rng.random() < 0.1),
            "segmentation": [
                rng.uniform(-5, 45, 2 * rng.integers(3, 6)).tolist()
                for _ in range(rng.integers(1, 4))
            ],
        }
        for _ in range(num_instances)
    ]
    if crop and any(not annotation["iscrowd"] for annotation in annotations):
        # Detectron2 needs another package to crop polygons.
        cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [0.6, 0.7]
        cfg.INPUT.MASK_FORMAT = mask_format = "bitmask"
        for annotation in annotations:
            polygons = rle.frPyObjects(annotation["segmentation"], *SIZE)
            annotation["segmentation"] = rle.merge(polygons)
    record = {**tiny_record, "annotations": annotations}
    mapped = []
    for mapper in (PanopticFPNMapper, DatasetMapper):
        np.random.seed(seed % 1000)
        mapped.append(mapper(cfg, is_train=True)(copy.deepcopy(record)))
    ours, theirs = mapped
    assert torch.equal(ours["image"], theirs["image"])
    ours, theirs = ours["instances"], theirs["instances"]
    assert torch.equal(ours.gt_classes, theirs.gt_classes)
    torch.testing.assert_close(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    if not len(theirs):
        return
    if mask_format == "bitmask":
        assert isinstance(ours.gt_masks, BitMasks)
        assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)
    else:
        assert isinstance(ours.gt_masks, PolygonMasks)
        polygons = [
            [p.tolist() for p in i] for masks in mapped for i in masks["instances"].gt_masks
        ]
        assert polygons[: len(ours)] == polygons[len(ours) :]


def test_precomputed_proposals_are_mapped_as_detectron2_does(cfg, tiny_record):
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = 2
    proposals = {
        "proposal_boxes": np.array([[1.0, 2, 30, 20], [3, 4, 9, 12], [0, 0, 5, 6]]),
        "proposal_objectness_logits": np.array([0.9, 0.7, 0.1]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    ours, theirs = (
        mapper(cfg, is_train=True)({**tiny_record, **proposals})["proposals"]
        for mapper in (PanopticFPNMapper, DatasetMapper)
    )
    assert torch.equal(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
    assert torch.equal(ours.objectness_logits, theirs.objectness_logits)
    assert len(ours) == 2


def test_masks_of_a_model_without_masks_are_not_made(cfg, tiny_record):
    cfg.MODEL.MASK_ON = False
    instances = PanopticFPNMapper(cfg, is_train=True)(tiny_record)["instances"]
    assert instances.get_fields().keys() == {"gt_boxes", "gt_classes"}


def test_an_image_without_things(cfg, record):
    record = {k: v for k, v in record.items() if k != "annotations"}
    ids = read_panoptic_png(record["pan_seg_file_name"])
    record["segments_info"] = [
        {"id": int(i), "category_id": 1, "isthing": False, "iscrowd": 0}
        for i in np.unique(ids)
        if i
    ]
    mapped = PanopticFPNMapper(cfg, is_train=True)(record)
    assert len(mapped["instances"]) == 0


def test_inference_inputs_keep_what_evaluators_need(cfg, record):
    mapped = PanopticFPNMapper(cfg, is_train=False)(record)
    assert "sem_seg" not in mapped and "instances" not in mapped and "annotations" not in mapped
    assert mapped["segments_info"] == record["segments_info"]
    assert mapped["pan_seg_file_name"] == record["pan_seg_file_name"]
    assert (mapped["height"], mapped["width"]) == (record["height"], record["width"])


def test_records_without_a_panoptic_png_are_mapped_as_detectron2_does(cfg, record, tmp_path):
    sem_seg = tmp_path / "sem_seg.png"
    cv2.imwrite(str(sem_seg), np.full((record["height"], record["width"]), 3, np.uint8))
    record = {k: v for k, v in record.items() if k not in ("pan_seg_file_name", "segments_info")}
    mapped = PanopticFPNMapper(cfg, is_train=True)({**record, "sem_seg_file_name": str(sem_seg)})
    assert mapped["sem_seg"].unique().tolist() == [3]
    assert len(mapped["instances"]) > 0


def test_faulty_files_are_errors_that_name_the_file(cfg, record, tmp_path):
    mapper = PanopticFPNMapper(cfg, is_train=True)
    with pytest.raises(UserError, match=r"missing\.png"):
        mapper({**record, "file_name": str(tmp_path / "missing.png")})
    small = tmp_path / "small.png"
    cv2.imwrite(str(small), np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"small\.png.*9x8"):
        mapper({**record, "pan_seg_file_name": str(small)})
    with pytest.raises(UserError, match=r"small\.png"):
        mapper({**record, "file_name": str(small)})


def test_shapes_metadata_follows_its_json(shapes):
    categories = json.loads((shapes / "annotations" / "panoptic_val.json").read_text())[
        "categories"
    ]
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get("shapes_val")
    assert len(metadata.thing_classes) == sum(c["isthing"] for c in categories)
    assert len(metadata.stuff_classes) == sum(not c["isthing"] for c in categories) + 1


@pytest.mark.parametrize("value", [-1, 256])
def test_void_must_be_a_byte(cfg, value):
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = value
    with pytest.raises(UserError, match=f"IGNORE_VALUE {value}: must be 0 to 255"):
        PanopticFPNMapper(cfg, is_train=True)
