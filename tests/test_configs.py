"""Every config file is complete, and the zoo's models are ours with two names changed."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
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


def differences(mine, theirs, prefix=""):
    """Keys of Detectron2 whose values differ."""
    found = {}
    for key, value in theirs.items():
        if isinstance(value, CfgNode):
            found |= differences(mine[key], value, f"{prefix}{key}.")
        elif mine[key] != value:
            found[prefix + key] = (mine[key], value)
    return found


INSTANCES = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize("name", [*ZOO, INSTANCES])
def test_our_coco_configs_are_the_zoos(name):
    """In every key, but for the names of what is ours."""
    theirs = get_cfg()
    theirs.merge_from_file(model_zoo.get_config_file(name))
    mine = ours(REPOSITORY / "configs" / name.replace("Misc", "COCO-PanopticSegmentation"))
    found = differences(mine, theirs)
    renamed = {"DATASETS.TRAIN", "DATASETS.TEST", "MODEL.SEM_SEG_HEAD.NAME"}
    if name == INSTANCES:
        renamed |= {"MODEL.SEM_SEG_HEAD.LOSS_WEIGHT"}  # there is no semantic branch
    else:
        renamed |= {"MODEL.META_ARCHITECTURE"}
    assert found.keys() == renamed, found


@pytest.mark.parametrize("task", ["Panoptic", "Semantic", "Instance"])
@pytest.mark.parametrize("depth", [50, 101])
def test_cityscapes_configs_have_the_papers_recipe(task, depth):
    names = {"Panoptic": "panoptic_fpn", "Semantic": "semantic_fpn", "Instance": "mask_rcnn"}
    name = f"{names[task]}_R_{depth}{'_FPN' if task == 'Instance' else ''}.yaml"
    cfg = ours(REPOSITORY / "configs" / f"Cityscapes-{task}Segmentation" / name)
    solver, crop = cfg.SOLVER, cfg.INPUT.CROP
    assert (solver.OPTIMIZER, solver.IMS_PER_BATCH, solver.BASE_LR) == ("SGD", 32, 0.01)
    assert (solver.MAX_ITER, solver.STEPS, solver.GAMMA) == (65000, (40000, 55000), 0.1)
    assert (crop.ENABLED, crop.TYPE, crop.SIZE) == (True, "absolute", [512, 1024])
    assert crop.AFTER_RESIZE
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING) == ((512, 2048), "range")
    assert cfg.INPUT.COLOR_AUG_SSD
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 2048)
    assert depth == cfg.MODEL.RESNETS.DEPTH
    assert cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT == 1.0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_images_without_things_are_left_out_of_mask_r_cnns_training_alone(path):
    cfg = ours(path)
    alone = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert alone == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


@pytest.mark.parametrize(
    ("two", "semantic"),
    [
        (
            "COCO-PanopticSegmentation/two_networks_R_50_1x",
            "COCO-SemanticSegmentation/semantic_fpn_R_50_1x",
        ),
        ("ablations/panoptic/two_networks", "ablations/semantic/sum_64"),
    ],
)
def test_the_semantic_one_of_two_networks_learns_as_it_does_alone(two, semantic):
    """By the same loss, from the same images, in as many steps."""
    two, alone = (ours(REPOSITORY / "configs" / f"{name}.yaml") for name in (two, semantic))
    assert two.MODEL.META_ARCHITECTURE == "TwoNetworkPanopticFPN"
    assert two.MODEL.SEM_SEG_HEAD == alone.MODEL.SEM_SEG_HEAD
    assert (two.MODEL.BACKBONE, two.MODEL.FPN) == (alone.MODEL.BACKBONE, alone.MODEL.FPN)
    assert (two.SOLVER, two.INPUT, two.DATALOADER) == (alone.SOLVER, alone.INPUT, alone.DATALOADER)


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
