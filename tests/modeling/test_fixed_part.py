"""Inference by CUDA graphs against inference without; on CPUs there are none."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from panoptic_fpn_ext import add_panoptic_fpn_config
from panoptic_fpn_ext.modeling.fixed_part import FixedPart

from ..conftest import assert_same_outputs


@pytest.fixture(params=["PanopticFPNExt", "TwoNetworkPanopticFPN"])
def models(request, ext_cfg):
    """A model with graphs, and one without."""
    add_panoptic_fpn_config(ext_cfg)
    ext_cfg.MODEL.META_ARCHITECTURE = request.param
    model = build_model(ext_cfg).eval()
    with_graphs = copy.deepcopy(model)
    with_graphs.fixed_part = FixedPart(cuda_graphs=True)
    return with_graphs, model


@torch.no_grad()
def test_outputs_are_the_same_also_with_other_weights(models, training_batch, device):
    image = training_batch[0]["image"]
    batches = [[{"image": image}], [{"image": image[:, :64]}]]
    for change in (lambda model: None, scaled, replaced):
        for model in models:
            change(model)
        for _ in range(3):
            for batch in batches:
                (found,), (expected,) = (model(batch) for model in models)
                assert_same_outputs(found, expected)
        graphs = models[0].fixed_part._graphs
        functions = 2 if hasattr(models[0], "semantic_network") else 1
        assert len(graphs) == (2 * functions if device.type == "cuda" else 0)
        assert all(graphs.values())


def scaled(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.98)


def replaced(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight * 1.01)


@torch.no_grad()
def test_copies_and_files_have_no_graphs_and_make_their_own(models, training_batch):
    model, plain = models
    for _ in range(2):
        expected = plain(training_batch)
        model(training_batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.fixed_part.cuda_graphs and not twin.fixed_part._graphs
        for _ in range(3):
            for found, each in zip(twin(training_batch), expected, strict=True):
                assert_same_outputs(found, each)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@torch.no_grad()
def test_mixed_precision_is_that_without(ext_cfg, training_batch, precision):
    add_panoptic_fpn_config(ext_cfg)
    ext_cfg.MODEL.ACCELERATION.PRECISION = precision
    model = build_model(ext_cfg).eval()
    expected = model(training_batch)
    model.fixed_part = FixedPart(cuda_graphs=True)
    for _ in range(3):
        for found, each in zip(model(training_batch), expected, strict=True):
            torch.testing.assert_close(found["sem_seg"], each["sem_seg"])
