"""Detectron2's LazyConfig, and models written by hand."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from torch.testing import assert_close

from panoptic_fpn_ext.modeling import PanopticFPNExt, SemanticFPNHead

from ...conftest import assert_same_outputs


@pytest.fixture
def configs():
    """Detectron2's lazy Panoptic FPN, and the same with two names changed."""
    theirs, ours = (model_zoo.get_config("common/models/panoptic_fpn.py").model for _ in range(2))
    ours._target_ = PanopticFPNExt
    ours.sem_seg_head._target_ = SemanticFPNHead
    for config in (theirs, ours):
        config.combine_overlap_thresh = 0.4
        config.combine_stuff_area_thresh = 64
        config.combine_instances_score_thresh = 0.0
        config.roi_heads.box_predictor.test_score_thresh = 0.0
        config.roi_heads.box_predictor.test_topk_per_image = 5
    return theirs, ours


@torch.no_grad()
def test_a_lazy_config_needs_two_names_changed(configs):
    theirs, ours = map(instantiate, configs)
    state = theirs.state_dict()
    for name, value in state.items():
        if name.endswith("conv3.norm.weight"):
            value *= 0.1  # random residual branches add up to infinity
    ours.load_state_dict(state, strict=True)
    inputs = [{"image": torch.randint(0, 256, (3, 96, 128)).float()}]
    (expected,), (found,) = theirs.eval()(inputs), ours.eval()(inputs)
    assert_close(found["sem_seg"], expected["sem_seg"], atol=1e-3, rtol=1e-3)
    assert_same_outputs(found, expected)
