"""Checkpoints that do not fit the model."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer


@pytest.fixture
def checkpoint(ext_cfg, tmp_path):
    """Of a model with 3 thing classes and 4 semantic classes."""
    PanopticFPNCheckpointer(build_model(ext_cfg), str(tmp_path)).save("trained")
    return str(tmp_path / "trained.pth")


def other_classes(cfg, things=5, sem_seg=4):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = things
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = sem_seg
    return build_model(cfg)


THINGS = (
    r"trained\.pth: roi_heads\.box_predictor\.cls_score\.weight is for 3 thing classes, but the "
    r"model has 5 \(MODEL\.ROI_HEADS\.NUM_CLASSES\)"
)
SEM_SEG = (
    r"trained\.pth: sem_seg_head\.predictor\.weight is for 4 semantic classes, but the model has 7 "
    r"\(MODEL\.SEM_SEG_HEAD\.NUM_CLASSES\)"
)


@pytest.mark.parametrize(("counts", "message"), [((5, 4), THINGS), ((3, 7), SEM_SEG)])
def test_evaluating_with_other_classes_is_an_error(ext_cfg, checkpoint, counts, message):
    model = other_classes(ext_cfg, *counts)
    with pytest.raises(UserError, match=message) as error:
        PanopticFPNCheckpointer(model, complete=True).resume_or_load(checkpoint, resume=False)
    assert "\n" not in str(error.value)


def test_fine_tuning_with_other_classes_is_a_warning(ext_cfg, checkpoint, caplog):
    model = other_classes(ext_cfg, 5, 7)
    with caplog.at_level(logging.WARNING):
        PanopticFPNCheckpointer(model).resume_or_load(checkpoint, resume=False)
    warnings = [w for w in caplog.messages if "trained from scratch" in w]
    assert len(warnings) == 2
    assert any("cls_score" in w and " 3 " in w and " 5 " in w for w in warnings)
    assert any("sem_seg_head" in w and " 4 " in w and " 7 " in w for w in warnings)
    loaded = torch.load(checkpoint)["model"]["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(model.state_dict()["backbone.bottom_up.stem.conv1.weight"], loaded)


def test_resuming_with_other_classes_is_an_error(ext_cfg, tmp_path, checkpoint):
    model = other_classes(ext_cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = PanopticFPNCheckpointer(model, str(tmp_path), optimizer=optimizer)
    with pytest.raises(UserError, match=THINGS):
        checkpointer.resume_or_load("", resume=True)


def test_other_shapes_and_missing_parameters_are_errors_in_evaluation(
    ext_cfg, tmp_path, checkpoint
):
    content = torch.load(checkpoint)
    name = "sem_seg_head.p2.0.weight"
    right = content["model"].pop(name)
    torch.save(content, tmp_path / "lacking.pth")
    checkpointer = PanopticFPNCheckpointer(build_model(ext_cfg), complete=True)
    with pytest.raises(UserError, match=rf"lacking\.pth: lacks 1 of the model's \d+ .*{name}"):
        checkpointer.load(str(tmp_path / "lacking.pth"))
    content = torch.load(checkpoint)
    content["model"][name] = right[:, :3]
    torch.save(content, tmp_path / "other.pth")
    checkpointer = PanopticFPNCheckpointer(build_model(ext_cfg), complete=True)
    with pytest.raises(UserError, match=rf"other\.pth: {name} has shape \[\d+, 3, 3, 3\], but \["):
        checkpointer.load(str(tmp_path / "other.pth"))


def test_a_whole_checkpoint_of_the_model_loads(ext_cfg, detectron2_cfg, checkpoint):
    for cfg in (ext_cfg, detectron2_cfg):
        model = build_model(cfg)
        PanopticFPNCheckpointer(model, complete=True).load(checkpoint)
        for name, value in torch.load(checkpoint)["model"].items():
            assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_files_are_one_line(ext_cfg, tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.pth: not a checkpoint, or damaged") as error:
        PanopticFPNCheckpointer(build_model(ext_cfg)).load(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(ext_cfg, tmp_path):
    path = str(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file$"):
        PanopticFPNCheckpointer(build_model(ext_cfg)).resume_or_load(path, resume=False)


@pytest.mark.parametrize("complete", [False, True])
def test_a_backbone_suffices_only_where_it_may(ext_cfg, tmp_path, checkpoint, complete):
    weights = torch.load(checkpoint)["model"]
    path = str(tmp_path / "backbone.pth")
    backbone = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    torch.save({"model": backbone}, path)
    model = build_model(ext_cfg)
    PanopticFPNCheckpointer(model, complete=complete, backbone_suffices=True).load(path)
    for name, value in backbone.items():
        assert torch.equal(model.state_dict()[name], value)
    if complete:
        with pytest.raises(UserError, match=r"backbone\.pth: lacks \d+ of the model's"):
            PanopticFPNCheckpointer(model, complete=True).load(path)
    torch.save({"model": {**backbone, "roi_heads.box_head.fc1.weight": torch.zeros(2)}}, path)
    checkpointer = PanopticFPNCheckpointer(model, complete=complete, backbone_suffices=True)
    if complete:
        with pytest.raises(UserError, match=r"backbone\.pth: roi_heads.* has shape \[2\]"):
            checkpointer.load(path)
    else:
        checkpointer.load(path)
