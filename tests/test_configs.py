"""Every config file is complete, and the zoo's models are ours with two names changed."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from panoptic_fpn_ext import add_panoptic_fpn_config

from .conftest import REPOSITORY, assert_same_outputs

CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs").rglob("*.yaml")
    if not path.name.startswith("Base") and "ablations" not in path.parts
)
ZOO = [
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml",
]
# What a model is made of; the rest is how it is trained.
NETWORK = ("BACKBONE", "RESNETS", "FPN", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD")
NETWORK += ("ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "PANOPTIC_FPN", "WEIGHTS")


def ours(path):
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def zoo_cfg(name):
    """A zoo config for this machine: without deformable convolutions, which need compiled ones."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    cfg.MODEL.DEVICE = "cpu"
    # Random weights must find something.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 16
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_config_files_have_known_keys_and_registered_names(path):
    from detectron2.data import DatasetCatalog
    from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

    cfg = ours(path)
    assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert cfg.MODEL.SEM_SEG_HEAD.NAME in SEM_SEG_HEADS_REGISTRY
    assert set(cfg.DATASETS.TRAIN + cfg.DATASETS.TEST) <= set(DatasetCatalog.list())


@pytest.mark.parametrize("name", ZOO)
def test_our_coco_configs_are_the_zoos(name):
    theirs = get_cfg()
    theirs.merge_from_file(model_zoo.get_config_file(name))
    mine = ours(REPOSITORY / "configs" / "COCO-PanopticSegmentation" / name.rpartition("/")[2])
    theirs.MODEL.SEM_SEG_HEAD.NAME = "SemanticFPNHead"
    for cfg in (mine, theirs):
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80, 54

    def differ(mine, theirs):
        return {
            k: (mine[k], v) for k, v in theirs.items() if not isinstance(v, dict) and mine[k] != v
        }

    for part in NETWORK:
        value, expected = mine.MODEL[part], theirs.MODEL[part]
        assert (differ(value, expected) == {}) if isinstance(value, dict) else value == expected
    keys = ("IMS_PER_BATCH", "BASE_LR", "STEPS", "MAX_ITER", "WEIGHT_DECAY")
    assert [mine.SOLVER[k] for k in keys] == [theirs.SOLVER[k] for k in keys]
    assert mine.INPUT.MIN_SIZE_TRAIN == theirs.INPUT.MIN_SIZE_TRAIN


@pytest.mark.slow
@pytest.mark.parametrize("name", [ZOO[0], ZOO[2], ZOO[3]], ids=["R50", "R101", "cascade"])
def test_a_built_in_models_weights_load_and_give_its_outputs(name, tmp_path):
    cfg = zoo_cfg(name)
    theirs = build_model(cfg).eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value *= 0.1  # random residual branches add up to infinity
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPNExt"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemanticFPNHead"
    mine = build_model(cfg).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    inputs = [{"image": image, "height": 120, "width": 160}]
    with torch.no_grad():
        (expected,), (found,) = theirs(inputs), mine(inputs)
    assert_same_outputs(found, expected)
