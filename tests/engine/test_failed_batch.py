"""A loss that is nan: the batch is kept, and replayed to the same losses."""

import math
import re
import sys

import pytest
import torch

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.config import resolve_config
from panoptic_fpn_ext.engine import Trainer
from panoptic_fpn_ext.engine.run_folder import write_config
from panoptic_fpn_ext.modeling.semantic_head import SemanticFPNHead

from ..conftest import REPOSITORY, on_cpu

sys.path.insert(0, str(REPOSITORY / "tools"))
import replay_batch

pytestmark = [pytest.mark.faults, on_cpu]
ITERATION = 2
ROUNDING = 6e-3  # the message has three digits


@pytest.fixture
def failed(training_cfg, tmp_path, monkeypatch) -> str:
    """The message of a training whose semantic loss is nan in its third iteration."""
    cfg = training_cfg
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 5, 1e-4
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16  # of which proposals is random
    cfg = resolve_config(cfg)
    write_config(cfg, tmp_path)
    trainer = Trainer(cfg)
    plain = SemanticFPNHead.losses

    def losses(self, *args, **options):
        scale = torch.nan if trainer.iter == ITERATION else 1.0
        return {key: loss * scale for key, loss in plain(self, *args, **options).items()}

    monkeypatch.setattr(SemanticFPNHead, "losses", losses)
    with pytest.raises(UserError, match=f"at iteration {ITERATION}: .*replay_batch.py") as caught:
        trainer.train()
    return str(caught.value)


def terms(text: str) -> dict[str, float]:
    return {name: float(x) for name, x in re.findall(r"(loss_\w+) ([\d.e+-]+|nan)", text)}


def test_the_batch_comes_to_the_same_losses(failed, tmp_path, capsys):
    assert replay_batch.main([str(tmp_path / "failed_batch.pth")]) == 0
    said = capsys.readouterr().out
    assert terms(said) == pytest.approx(terms(failed), rel=ROUNDING, nan_ok=True)
    assert math.isnan(terms(said)["loss_sem_seg"])
    files = re.findall(r"\d+\.jpg", failed)
    assert re.findall(r"\d+\.jpg", said) == files and len(files) == 2
    assert "weights that" not in said
    assert "gradients that are infinite or nan: backbone" in said


def test_what_is_finite_now_is_said(failed, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    assert replay_batch.main([str(tmp_path / "failed_batch.pth")]) == 1
    said = capsys.readouterr().out
    found, expected = terms(said), terms(failed)
    assert found.pop("loss_sem_seg") > 0
    assert math.isnan(expected.pop("loss_sem_seg"))
    assert found == pytest.approx(expected, rel=ROUNDING)
    assert "all is finite" in said


def test_the_first_layer_and_bad_weights_are_named(failed, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    file = tmp_path / "failed_batch.pth"
    content = torch.load(file, weights_only=True)
    content["model"]["sem_seg_head.predictor.bias"][0] = torch.inf
    torch.save(content, file)
    assert replay_batch.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "weights that are infinite or nan: sem_seg_head.predictor.bias\n" in said
    assert "nan: that of sem_seg_head.predictor (" in said


@pytest.mark.parametrize("content", [{"model": {}}, [1], None])
def test_other_files_are_refused(failed, tmp_path, capsys, content):
    file = tmp_path / "failed_batch.pth"
    torch.save(content, file) if content else file.unlink()
    assert replay_batch.main([str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line


def test_a_disk_that_is_full_hides_nothing(training_cfg, tmp_path, monkeypatch, caplog):
    def full(*args, **options):
        raise UserError("no space left")

    monkeypatch.setattr("panoptic_fpn_ext.engine.trainer.save_failed_batch", full)
    training_cfg.SOLVER.BASE_LR, training_cfg.SOLVER.MAX_ITER = 1e30, 4
    with pytest.raises(UserError, match="the loss is infinite or nan") as caught:
        Trainer(training_cfg).train()
    assert "replay_batch" not in str(caught.value)
    assert "not kept: no space left" in caplog.text
