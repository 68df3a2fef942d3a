"""Checkpoints that do not fit the model."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathHandler
from torch import nn

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer

from ..conftest import CPU


@pytest.fixture
def device() -> torch.device:
    """Files are the same everywhere."""
    return CPU


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


def test_heads_of_a_cascade_count_classes_too(ext_cfg, tmp_path):
    ext_cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    ext_cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    PanopticFPNCheckpointer(build_model(ext_cfg), str(tmp_path)).save("trained")
    with pytest.raises(
        UserError, match=r"box_predictor\.0\.cls_score\.weight is for 3 thing class"
    ):
        PanopticFPNCheckpointer(other_classes(ext_cfg), complete=True).load(
            str(tmp_path / "trained.pth")
        )


def test_fine_tuning_with_other_classes_is_a_warning(ext_cfg, checkpoint, caplog):
    model = other_classes(ext_cfg, 5, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        checkpointer = PanopticFPNCheckpointer(model, optimizer=optimizer)
        checkpointer.resume_or_load(checkpoint, resume=False)
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


def test_other_shapes_are_errors_in_evaluation(ext_cfg, checkpoint):
    ext_cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 64
    name = r"sem_seg_head\.p2\.0\.weight"
    checkpointer = PanopticFPNCheckpointer(build_model(ext_cfg), complete=True)
    with pytest.raises(
        UserError, match=rf"trained\.pth: {name} has shape \[32, 32, 3, 3\], but \["
    ):
        checkpointer.load(checkpoint)


@pytest.mark.parametrize("backbone_suffices", [False, True])
def test_missing_parameters_are_errors_in_evaluation(ext_cfg, checkpoint, backbone_suffices):
    content = torch.load(checkpoint)
    name = "sem_seg_head.p2.0.weight"
    del content["model"][name]
    torch.save(content, checkpoint)
    checkpointer = PanopticFPNCheckpointer(
        build_model(ext_cfg), complete=True, backbone_suffices=backbone_suffices
    )
    with pytest.raises(UserError, match=rf"trained\.pth: lacks 1 of the model's \d+ .*{name}"):
        checkpointer.load(checkpoint)


def test_what_a_checkpoint_may_lack(tmp_path):
    """Buffers, which have their initial values, and further names of the same parameter."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.append(model[0])
    weights = model.state_dict()
    lacking = {name: weights[name] for name in ("1.weight", "1.bias", "2.weight", "2.bias")}
    torch.save({"model": lacking}, tmp_path / "lacking.pth")
    PanopticFPNCheckpointer(model, complete=True).load(str(tmp_path / "lacking.pth"))


def test_a_whole_checkpoint_of_the_model_loads(ext_cfg, detectron2_cfg, checkpoint):
    for cfg in (ext_cfg, detectron2_cfg):
        model = build_model(cfg)
        PanopticFPNCheckpointer(model, complete=True).load(checkpoint)
        for name, value in torch.load(checkpoint)["model"].items():
            assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not a checkpoint", b"PK\x03\x04 cut off", b"\x80\x35 cut off", b"\x80\x02h\x05."),
        *([1], {"model": 3}, {"model": {"name": "text"}}, {"info": {}}),
    ],
)
@pytest.mark.parametrize("extension", ["pth", "pkl"])
def test_other_and_damaged_files_are_one_line(ext_cfg, tmp_path, content, extension):
    path = tmp_path / f"other.{extension}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif extension == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"other\.p.*: not a checkpoint, or damaged") as error:
        PanopticFPNCheckpointer(nn.Linear(1, 1)).load(str(path))
    assert "\n" not in str(error.value)


def test_files_elsewhere_and_none_at_all(ext_cfg, checkpoint):
    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["elsewhere://"]

        def _get_local_path(self, path, **kwargs):
            return checkpoint

    model = build_model(ext_cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpointer = PanopticFPNCheckpointer(model)
    assert checkpointer.load("") == {}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    checkpointer.path_manager = copy.copy(checkpointer.path_manager)
    checkpointer.path_manager.register_handler(Handler())
    checkpointer.load("elsewhere://trained.pth")
    for name, value in torch.load(checkpoint)["model"].items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_missing_file_is_one_line(ext_cfg, tmp_path):
    path = str(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file$"):
        PanopticFPNCheckpointer(build_model(ext_cfg)).resume_or_load(path, resume=False)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("complete", [False, True])
def test_a_backbone_suffices_only_where_it_may(ext_cfg, tmp_path, checkpoint, complete, prefix):
    weights = torch.load(checkpoint)["model"]
    path = str(tmp_path / "backbone.pth")
    backbone = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    torch.save({"model": {f"{prefix}{name}": value for name, value in backbone.items()}}, path)
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


def test_a_backbone_of_imagenet_suffices(ext_cfg, tmp_path, checkpoint):
    prefix = "backbone.bottom_up."
    weights = {
        name.removeprefix(prefix): value.numpy()
        for name, value in torch.load(checkpoint)["model"].items()
        if name.startswith(prefix)
    }
    content = {"model": weights, "__author__": "a converter", "matching_heuristics": True}
    path = tmp_path / "imagenet.pkl"
    path.write_bytes(pickle.dumps(content))
    model = build_model(ext_cfg)
    PanopticFPNCheckpointer(model, complete=True, backbone_suffices=True).load(str(path))
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[prefix + name], torch.from_numpy(value))
