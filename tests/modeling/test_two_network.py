"""Two networks against the same networks apart."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.modeling import merge_panoptic


@pytest.fixture
def networks(ext_cfg):
    """A Mask R-CNN and a Semantic FPN, with different weights, in inference mode."""
    networks = []
    for name in ("GeneralizedRCNN", "SemanticFPN"):
        ext_cfg.MODEL.META_ARCHITECTURE = name
        networks.append(build_model(ext_cfg).eval())
    return networks


@pytest.fixture
def two_networks(ext_cfg, networks, tmp_path):
    """The two merged, their weights read from files."""
    cfg = with_keys(ext_cfg)
    for key, network in zip(("INSTANCE_WEIGHTS", "SEMANTIC_WEIGHTS"), networks, strict=True):
        path = tmp_path / f"{key}.pth"
        torch.save({"model": network.state_dict()}, path)
        cfg.MODEL.TWO_NETWORK[key] = str(path)
    return build_model(cfg).eval()


def with_keys(cfg):
    from panoptic_fpn_ext.config import resolve_dataset_keys

    cfg = resolve_dataset_keys(cfg)
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "TwoNetworkPanopticFPN"
    return cfg


def test_outputs_are_those_of_the_networks_apart(networks, two_networks, training_batch):
    inputs = [{"image": x["image"], "height": 70, "width": 90} for x in training_batch]
    with torch.no_grad():
        merged = two_networks(inputs)
        apart = [network(inputs) for network in networks]
    for result, instances, sem_seg in zip(merged, *apart, strict=True):
        assert_close(result["sem_seg"], sem_seg["sem_seg"])
        assert_close(result["instances"].scores, instances["instances"].scores)
        expected = merge_panoptic(
            instances["instances"], sem_seg["sem_seg"].argmax(0), **two_networks.postprocess.merging
        )
        assert_close(result["panoptic_seg"][0], expected[0])
        assert result["panoptic_seg"][1] == expected[1]


def test_losses_are_those_of_the_networks_apart(networks, two_networks, training_batch):
    found = []
    for model in (two_networks, *networks):
        torch.manual_seed(3)
        with EventStorage():
            found.append(model.train()(training_batch))
    merged, instance, semantic = found
    assert_close(merged, {**instance, **semantic})


def test_one_set_of_weights_is_an_error_that_names_the_other(ext_cfg, networks, tmp_path):
    cfg = with_keys(ext_cfg)
    cfg.MODEL.TWO_NETWORK.INSTANCE_WEIGHTS = str(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"MODEL\.TWO_NETWORK\.SEMANTIC_WEIGHTS is not set"):
        build_model(cfg)
