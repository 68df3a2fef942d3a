"""The life of a model, step by step beside Detectron2's built-in one.

Ours lives on, through training, evaluations, averaging, saving, loading and fine-tuning. Before
each training step and evaluation the built-in model gets its weights; both must then do the same.
In double precision they do to many digits; in single precision, where rounding now and then
changes which proposals are drawn, roughly.
"""

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import boxes as box_ops

from panoptic_fpn_ext.engine import launch
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer

from .conftest import devices, on_devices

TOLERANCES = {torch.float64: 1e-5, torch.float32: 0.1}
batched_nms = box_ops.batched_nms


class Life:
    """Our model, an average of its weights, and the built-in model at its side."""

    def __init__(self, cfgs: tuple[CfgNode, CfgNode], weights: str, dtype: torch.dtype) -> None:
        self.model, self.builtin = (build_model(cfg).to(dtype) for cfg in cfgs)
        PanopticFPNCheckpointer(self.model).load(weights)
        self.average = copy.deepcopy(self.model)
        self.trained = [
            (
                create_ddp_model(model, device_ids=None, broadcast_buffers=False),
                build_optimizer(cfg, model),
            )
            for cfg, model in zip(cfgs, (self.model, self.builtin), strict=True)
        ]
        self.tolerance = TOLERANCES[dtype]

    def train(self, batch: list[dict], steps: int = 1) -> None:
        for step in range(steps):
            self.builtin.load_state_dict(self.model.state_dict())
            before = [p.detach().clone() for p in self.model.parameters()]
            losses = []
            for model, optimizer in self.trained:
                model.train()
                torch.manual_seed(step)  # anchors and proposals are drawn
                with EventStorage():
                    losses.append(model(batch))
                optimizer.zero_grad()
                sum(losses[-1].values()).backward()
                optimizer.step()
            # On GPUs the built-in model's RPN may lose double precision.
            close = {"rtol": self.tolerance, "atol": self.tolerance, "check_dtype": False}
            torch.testing.assert_close(*losses, **close)
            self.compare_steps(before)
            for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.data.mul_(0.5).add_(p.data, alpha=0.5)

    def compare_steps(self, before: list[torch.Tensor]) -> None:
        """Every parameter went where the built-in model's went, and those not frozen did go."""
        ours, theirs = self.model.named_parameters(), self.builtin.named_parameters()
        for (name, p), (other, expected), start in zip(ours, theirs, before, strict=True):
            assert name == other
            way = (expected - start).norm()
            assert bool(way) == p.requires_grad == expected.requires_grad, name
            assert (p - expected).norm() <= self.tolerance * way, name
        for (name, ours), theirs in zip(
            self.model.named_buffers(), self.builtin.buffers(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)

    @torch.no_grad()
    def evaluate(self, batch: list[dict]) -> None:
        images = [{"image": record["image"]} for record in batch]
        for model in (self.model, self.average):
            self.builtin.load_state_dict(model.state_dict())
            ours, theirs = model.eval()(images), self.builtin.eval()(images)
            for found, expected in zip(ours, theirs, strict=True):
                logits = found["sem_seg"], expected["sem_seg"]
                torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
                scores = found["instances"].scores, expected["instances"].scores
                torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)
                differs = found["panoptic_seg"][0] != expected["panoptic_seg"][0]
                assert differs.float().mean() < 0.01


# Detectron2 passes boxes on as single precision, whatever the scores are.
@mock.patch.object(box_ops, "batched_nms", lambda b, s, *args: batched_nms(b, s.float(), *args))
def live(
    norm: str,
    dtype: torch.dtype,
    detectron2_cfg: CfgNode,
    ext_cfg: CfgNode,
    batch: list[dict],
    folder: Path,
) -> None:
    """A life, in each process on images of its own."""
    for cfg in (detectron2_cfg, ext_cfg):  # narrow
        cfg.MODEL.RESNETS.DEPTH = 50
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    batch = batch[comm.get_rank() :]
    folder = folder / f"{norm} {dtype}"
    if comm.is_main_process():
        folder.mkdir()
        PanopticFPNCheckpointer(pretrained(detectron2_cfg, batch), str(folder)).save("pretrained")
    comm.synchronize()
    cfgs = (ext_cfg.clone(), detectron2_cfg.clone())
    for cfg in cfgs:
        cfg.MODEL.RESNETS.NORM = norm

    life = Life(cfgs, str(folder / "pretrained.pth"), dtype)
    life.train(batch, steps=2)
    life.evaluate(batch)
    life.train(batch)
    life.evaluate(batch)
    if comm.is_main_process():
        PanopticFPNCheckpointer(life.model, str(folder)).save("trained")
    comm.synchronize()
    loaded = Life(cfgs, str(folder / "trained.pth"), dtype)
    loaded.evaluate(batch)
    loaded.train(batch)

    for cfg in cfgs:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5, 6
        cfg.MODEL.BACKBONE.FREEZE_AT = 2
    tuned = Life(cfgs, str(folder / "trained.pth"), dtype)
    tuned.train(batch)
    tuned.evaluate(batch)
    tuned.train(batch)


def pretrained(cfg: CfgNode, batch: list[dict]) -> nn.Module:
    """A model with statistics of batch normalization that fit its weights."""
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            module.momentum = None  # of all batches
    with EventStorage(), torch.no_grad():
        model(batch)
    return model


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [("FrozenBN", torch.float32), ("FrozenBN", torch.float64), ("BN", torch.float64)],
)
def test_in_one_process(norm, dtype, detectron2_cfg, ext_cfg, training_batch, tmp_path):
    live(norm, dtype, detectron2_cfg, ext_cfg, training_batch, tmp_path)


def live_with_each_norm(*args) -> None:
    for norm in ("FrozenBN", "naiveSyncBN"):
        live(norm, torch.float64, *args)


@pytest.mark.slow
@on_devices(devices(num_gpus=2))
def test_in_two_processes(detectron2_cfg, ext_cfg, training_batch, tmp_path, device):
    arguments = detectron2_cfg, ext_cfg, training_batch, tmp_path
    launch(live_with_each_norm, 2, args=arguments, device=device.type)
