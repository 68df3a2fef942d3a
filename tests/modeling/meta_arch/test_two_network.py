"""Two networks against the same networks apart."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config
from panoptic_fpn_ext.modeling import merge_panoptic

from ...conftest import on_cpu

KEYS = ("INSTANCE_WEIGHTS", "SEMANTIC_WEIGHTS")


@pytest.fixture
def networks(ext_cfg):
    """A Mask R-CNN and a Semantic FPN, with different weights, in inference mode."""
    networks = []
    for name in ("GeneralizedRCNN", "SemanticFPN"):
        ext_cfg.MODEL.META_ARCHITECTURE = name
        networks.append(build_model(ext_cfg).eval())
    return networks


@pytest.fixture
def cfg(ext_cfg, networks, tmp_path):
    """The config of the two merged, their weights in files."""
    cfg = with_keys(ext_cfg)
    for key, network in zip(KEYS, networks, strict=True):
        path = tmp_path / f"{key}.pth"
        torch.save({"model": network.state_dict()}, path)
        cfg.MODEL.TWO_NETWORK[key] = str(path)
    return cfg


@pytest.fixture
def two_networks(cfg):
    return build_model(cfg).eval()


def with_keys(cfg):
    cfg = cfg.clone()
    add_panoptic_fpn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "TwoNetworkPanopticFPN"
    return cfg


def test_outputs_are_those_of_the_networks_apart(
    networks, two_networks, training_batch, device, rounding
):
    inputs = [{"image": x["image"], "height": 70, "width": 90} for x in training_batch]
    with torch.no_grad():
        merged = two_networks(inputs)
        apart = [network(inputs) for network in networks]
    for result, instances, sem_seg in zip(merged, *apart, strict=True):
        assert_close(result["sem_seg"], sem_seg["sem_seg"], **rounding)
        scores = result["instances"].scores, instances["instances"].scores
        assert_close(*scores, **rounding)
        masks = result["instances"].pred_masks, instances["instances"].pred_masks
        assert (masks[0] != masks[1]).float().mean() <= (0 if device.type == "cpu" else 1e-3)
        expected = merge_panoptic(
            result["instances"], sem_seg["sem_seg"].argmax(0), **two_networks.postprocess.merging
        )
        assert_close(result["panoptic_seg"][0], expected[0])
        assert result["panoptic_seg"][1] == expected[1]


def test_losses_are_those_of_the_networks_apart(networks, two_networks, training_batch, rounding):
    found = []
    for model in (two_networks, *networks):
        torch.manual_seed(3)
        with EventStorage():
            found.append(model.train()(training_batch))
    merged, instance, semantic = found
    assert_close(merged, {**instance, **semantic}, **rounding)


@on_cpu
def test_one_set_of_weights_is_an_error_that_names_the_other(ext_cfg, networks, tmp_path):
    cfg = with_keys(ext_cfg)
    cfg.MODEL.TWO_NETWORK.INSTANCE_WEIGHTS = str(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"MODEL\.TWO_NETWORK\.SEMANTIC_WEIGHTS is not set"):
        build_model(cfg)


@on_cpu
@pytest.mark.parametrize(
    ("key", "classes", "message"),
    [
        (
            "ROI_HEADS",
            5,
            r"MODEL\.TWO_NETWORK\.INSTANCE_WEIGHTS \S+/INSTANCE_WEIGHTS\.pth: "
            r"roi_heads\.box_predictor\.cls_score\.weight is for 3 thing classes, but the model "
            r"has 5 \(MODEL\.ROI_HEADS\.NUM_CLASSES\)$",
        ),
        (
            "SEM_SEG_HEAD",
            7,
            r"MODEL\.TWO_NETWORK\.SEMANTIC_WEIGHTS \S+/SEMANTIC_WEIGHTS\.pth: "
            r"sem_seg_head\.predictor\.weight is for 4 semantic classes, but the model has 7 "
            r"\(MODEL\.SEM_SEG_HEAD\.NUM_CLASSES\)$",
        ),
    ],
)
def test_weights_for_other_classes_are_an_error(cfg, key, classes, message):
    cfg.MODEL[key].NUM_CLASSES = classes
    refuses_to_build(cfg, message)


@on_cpu
@pytest.mark.parametrize(("key", "place"), [*zip(KEYS, (0, 1), strict=True)])
def test_weights_that_do_not_fit_are_an_error_that_names_key_and_file(
    cfg, networks, tmp_path, key, place
):
    start = rf"^MODEL\.TWO_NETWORK\.{key} \S+/{key}\.pth: "
    path = tmp_path / f"{key}.pth"
    other_networks_weights = {"model": networks[1 - place].state_dict()}
    torch.save(other_networks_weights, path)
    refuses_to_build(cfg, start + r"lacks \d+ of the model's \d+ parameters")
    weights = networks[place].state_dict()
    name = "backbone.fpn_output2.weight"
    torch.save({"model": {**weights, name: weights[name][:8]}}, path)
    refuses_to_build(cfg, start + rf"{name} has shape \[8, 32, 3, 3\], but \[32, 32, 3, 3\] in")
    path.write_bytes(b"not a checkpoint")
    refuses_to_build(cfg, start + "not a checkpoint, or damaged")
    path.unlink()
    refuses_to_build(cfg, start + "no such file$")


def refuses_to_build(cfg, message):
    with pytest.raises(UserError, match=message) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)


@on_cpu
def test_weights_of_a_backbone_are_enough_to_start_from(cfg, networks, tmp_path):
    weights = networks[0].backbone.bottom_up.state_dict()
    for key, content in zip(
        KEYS,
        (
            {"model": {f"backbone.bottom_up.{name}": value for name, value in weights.items()}},
            {"model": weights, "matching_heuristics": True},  # as those of ImageNet
        ),
        strict=True,
    ):
        torch.save(content, tmp_path / f"{key}.pth")
    model = build_model(cfg)
    for network in (model.instance_network, model.semantic_network):
        assert_close(network.backbone.bottom_up.state_dict(), weights)
