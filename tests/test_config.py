"""Class counts follow the dataset, and cannot be set wrong."""

import pytest
from detectron2.config import get_cfg

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.config import resolve_dataset_keys

from .data.tiny_dataset import TinyDataset


def config(*options):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_list(["DATASETS.TEST", "()", *options])
    return cfg


@pytest.fixture
def tiny(tmp_path):
    data = TinyDataset(tmp_path / "data", 1)
    with data.registered() as name:
        yield name, data


def test_counts_come_from_the_dataset(tiny):
    name, _ = tiny
    cfg = resolve_dataset_keys(config("DATASETS.TRAIN", f"('{name}',)"))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (2, 2)
    again = resolve_dataset_keys(cfg)
    assert again is cfg


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("ROI_HEADS", 80, "2 thing"), ("SEM_SEG_HEAD", 1, "2 semantic"), ("SEM_SEG_HEAD", 54, "2 s")],
)
def test_a_count_that_is_set_wrong_is_one_line(tiny, split, key, value, kind):
    name, _ = tiny
    cfg = config(f"DATASETS.{split}", f"('{name}',)", f"MODEL.{key}.NUM_CLASSES", value)
    message = rf"MODEL\.{key}\.NUM_CLASSES is {value}, but dataset tiny has {kind}"
    with pytest.raises(UserError, match=message) as error:
        resolve_dataset_keys(cfg)
    assert "\n" not in str(error.value)


def test_a_config_of_detectron2_alone_is_held_against_the_dataset_too(tiny):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("tiny",)
    with pytest.raises(UserError, match=r"ROI_HEADS\.NUM_CLASSES is 80, but dataset tiny has 2"):
        resolve_dataset_keys(cfg)


def test_datasets_of_different_classes(tiny, shapes):
    cfg = config("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('tiny',)")
    with pytest.raises(UserError, match=r"NUM_CLASSES is 5, but dataset tiny has 2 thing"):
        resolve_dataset_keys(cfg)


def test_predicting_needs_no_dataset(tiny):
    name, data = tiny
    data.panoptic_json.unlink()
    counts = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9]
    cfg = config("DATASETS.TRAIN", f"('{name}',)", *counts)
    cfg.MODEL.PANOPTIC_FPN.THING_SEM_SEG_IDS = [0]
    assert resolve_dataset_keys(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_evaluating_needs_no_training_data(shapes, tmp_path):
    with TinyDataset(tmp_path / "data", 1).registered() as name:
        (tmp_path / "data" / "panoptic.json").unlink()
        cfg = config("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "('shapes_val',)")
        assert resolve_dataset_keys(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 5
