"""The whole model against Detectron2's PanopticFPN, with the same weights."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from panoptic_fpn_ext import UserError, add_panoptic_fpn_config

from ...conftest import assert_same_outputs, on_cpu


@pytest.fixture
def models(detectron2_cfg, ext_cfg):
    theirs, ours = build_model(detectron2_cfg), build_model(ext_cfg)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def full_cfg(ext_cfg):
    """With the keys of this project."""
    add_panoptic_fpn_config(ext_cfg)
    return ext_cfg


def losses_of(model, batch):
    model.train()
    torch.manual_seed(3)  # RPN and ROI heads sample at random
    with EventStorage():
        return model(batch)


def test_losses_equal(models, training_batch, rounding):
    found, expected = (losses_of(model, training_batch) for model in models)
    assert set(found) == set(expected)
    assert_close(found, expected, **({"atol": 1e-5, "rtol": 1e-4} | rounding))


def test_instance_loss_weight_is_on_all_of_the_instance_branch(models, training_batch, rounding):
    """Detectron2's leaves the classification loss out."""
    model = models[0]
    plain = losses_of(model, training_batch)
    model.instance_loss_weight = 0.25
    weighted = losses_of(model, training_batch)
    weights = {"loss_cls": 0.25, "loss_box_reg": 0.25, "loss_mask": 0.25}
    expected = {k: v * weights.get(k, 1.0) for k, v in plain.items()}
    assert_close(weighted, expected, **rounding)


@pytest.mark.parametrize("size", [None, (61, 173), (96, 128)])
def test_outputs_equal(models, training_batch, size):
    inputs = [{"image": x["image"]} for x in training_batch]
    if size:
        for x in inputs:
            x["height"], x["width"] = size
    with torch.no_grad():
        ours, theirs = (model.eval()(inputs) for model in models)
    for mine, built_in in zip(ours, theirs, strict=True):
        assert_same_outputs(mine, built_in)


def test_raw_outputs_equal(models, training_batch):
    with torch.no_grad():
        (ours, our_logits), (theirs, their_logits) = (
            model.eval().inference(training_batch, do_postprocess=False) for model in models
        )
    assert_close(our_logits, their_logits, atol=1e-4, rtol=1e-3)
    boxes = ours[0].pred_boxes.tensor, theirs[0].pred_boxes.tensor
    assert_close(*boxes, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "unused"),
    [
        (["sem_seg"], "roi_heads"),
        (["instances"], "sem_seg_head"),
        (["panoptic_seg"], None),
        (["instances", "panoptic_seg"], None),
    ],
)
def test_only_the_outputs_asked_for(models, training_batch, outputs, unused, monkeypatch):
    model = models[0].eval()
    model.postprocess.outputs = frozenset(outputs)
    if unused:
        monkeypatch.setattr(getattr(model, unused), "forward", lambda *_: pytest.fail("was used"))
    with torch.no_grad():
        results = model(training_batch)
    assert [set(r) for r in results] == [set(outputs)] * 2


@pytest.mark.parametrize(
    ("weights", "losses", "unused"),
    [
        ((0.0, 0.5), {"loss_sem_seg"}, "roi_heads"),
        ((1.0, 0.0), {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn"}, "sem_seg_head"),
    ],
)
def test_a_loss_weight_of_0_switches_the_task_off(
    full_cfg, training_batch, weights, losses, unused, monkeypatch
):
    keys = full_cfg.MODEL
    keys.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT, keys.SEM_SEG_HEAD.LOSS_WEIGHT = weights
    model = build_model(full_cfg)
    monkeypatch.setattr(getattr(model, unused), "forward", lambda *_: pytest.fail("was used"))
    found = losses_of(model, training_batch)
    assert {k.replace("_cls", "").replace("_loc", "") if "rpn" in k else k for k in found} == losses
    assert not any(p.requires_grad for p in getattr(model, unused).parameters())


def test_alternate_training_has_one_task_in_each_iteration(full_cfg, training_batch, rounding):
    joint = build_model(full_cfg)
    full_cfg.MODEL.PANOPTIC_FPN.TRAINING = "alternate"
    alternate = build_model(full_cfg)
    alternate.load_state_dict(joint.state_dict())
    expected = losses_of(joint, training_batch)
    for iteration in (6, 7):  # as resumed from a checkpoint
        torch.manual_seed(3)
        with EventStorage(iteration):
            found = alternate.train()(training_batch)
        assert ("loss_sem_seg" in found) == (iteration == 7)
        assert ("loss_mask" in found) == (iteration == 6)
        assert_close(found, {k: expected[k] for k in found}, **rounding)


def test_each_branch_reads_its_own_group_of_channels(full_cfg, training_batch):
    full_cfg.MODEL.BACKBONE.NAME = "build_resnet_grouped_fpn_backbone"
    full_cfg.MODEL.FPN.GROUPS = 2
    model = build_model(full_cfg).eval()
    assert model.sem_seg_head.p2[0].in_channels == full_cfg.MODEL.FPN.OUT_CHANNELS // 2
    features = model.backbone(model.preprocess_image(training_batch).tensor)
    instance, semantic = (model._features_for(t, features) for t in ("instance", "semantic"))
    for name, feature in features.items():
        assert_close(torch.cat([instance[name], semantic[name]], dim=1), feature)
    losses_of(model, training_batch)["loss_mask"].backward()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@torch.no_grad()
def test_inference_in_mixed_precision_is_that_of_autocast(full_cfg, training_batch, precision):
    dtype = getattr(torch, precision)
    full_cfg.MODEL.PANOPTIC_FPN.OUTPUTS = ["sem_seg"]
    model = build_model(full_cfg).eval()
    with torch.autocast(model.device.type, dtype):
        (expected, *_) = model(training_batch)
    full_cfg.MODEL.ACCELERATION.PRECISION = precision
    mixed = build_model(full_cfg).eval()
    mixed.load_state_dict(model.state_dict())
    (found, *_) = mixed(training_batch)
    assert found["sem_seg"].dtype == expected["sem_seg"].dtype == dtype
    assert_close(found["sem_seg"], expected["sem_seg"])


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@torch.no_grad()
def test_mixed_precision_is_about_as_good(full_cfg, training_batch, precision):
    """All outputs, and pooling with samples at fixed places, which reads what lies outside."""
    full_cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    full_cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2
    model = build_model(full_cfg).eval()
    full_cfg.MODEL.ACCELERATION.PRECISION = precision
    mixed = build_model(full_cfg).eval()
    mixed.load_state_dict(model.state_dict())
    for found, expected in zip(mixed(training_batch), model(training_batch), strict=True):
        logits, exact = found["sem_seg"].float(), expected["sem_seg"]
        assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
        scores = found["instances"].scores.float(), expected["instances"].scores
        assert (scores[0] - scores[1]).abs().mean() < 0.05
        panoptic_seg, segments_info = found["panoptic_seg"]
        assert {*panoptic_seg.unique().tolist()} - {0} == {s["id"] for s in segments_info}


@on_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("MODEL.PANOPTIC_FPN.OUTPUTS", ["depth"]), r"PANOPTIC_FPN\.OUTPUTS.*depth.*sem_seg"),
        (("MODEL.ACCELERATION.PRECISION", "half"), r"ACCELERATION.PRECISION 'half'.*'float16'"),
        (("MODEL.MASK_ON", False), r"MASK_ON is False.*OUTPUTS"),
        (("MODEL.PANOPTIC_FPN.TRAINING", "turns"), r"TRAINING 'turns'.*'joint', 'alternate'"),
        (("MODEL.SEM_SEG_HEAD.AGGREGATION", "max"), r"AGGREGATION 'max'.*'sum', 'concat'"),
        (
            ("MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 0.0, "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 0.0),
            "both 0",
        ),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_key(full_cfg, change, message):
    full_cfg.merge_from_list(list(change))
    with pytest.raises(UserError, match=message):
        build_model(full_cfg)


@on_cpu
@pytest.mark.parametrize("name", ["instances", "sem_seg"])
def test_images_without_ground_truth_are_an_error_that_names_them(full_cfg, training_batch, name):
    del training_batch[1][name]
    training_batch[1]["file_name"] = "beach.jpg"
    with pytest.raises(UserError, match=rf"beach\.jpg: no '{name}' to train on"):
        losses_of(build_model(full_cfg), training_batch)


def test_training_is_drawn_every_so_often(full_cfg, training_batch, monkeypatch):
    full_cfg.VIS_PERIOD = 2
    model = build_model(full_cfg).train()
    drawn = []
    monkeypatch.setattr(model, "visualize_training", lambda *args: drawn.append(args))
    for iteration in range(4):
        with EventStorage(iteration):
            model(training_batch)
    assert len(drawn) == 2
