"""Shared by the tests of training."""

import logging

import pytest

from panoptic_fpn_ext import add_panoptic_fpn_config


@pytest.fixture
def training_cfg(shapes, ext_cfg, tmp_path, caplog):
    """Training on the tiny Shapes."""
    caplog.set_level(logging.INFO, "detectron2")  # else the trainer sets up logging, for good
    cfg = ext_cfg
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5, 6
    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MASK_FORMAT = (64,), "bitmask"
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 1, 1e-3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg
