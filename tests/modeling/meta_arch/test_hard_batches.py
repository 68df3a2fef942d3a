"""Batches with next to nothing to learn from give finite losses, gradients and weights."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from panoptic_fpn_ext import add_panoptic_fpn_config

from ...conftest import on_cpu

pytestmark = on_cpu


def image(boxes: list[list[int]], fill: int, size: tuple[int, int] = (64, 96)) -> dict:
    """With these boxes as instances, and ``fill`` as the class of all pixels."""
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    instances.gt_masks = BitMasks(masks)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "sem_seg": torch.full(size, fill)}


BATCHES = {
    "no things": lambda: [image([], 1), image([], 2, (48, 80))],
    "all void": lambda: [image([[5, 5, 40, 40]], 255), image([[8, 8, 20, 30]], 255)],
    "nothing at all": lambda: [image([], 255), image([], 255, (48, 80))],
    "one pixel": lambda: [image([[7, 9, 8, 10], [95, 63, 96, 64]], 1)] * 2,
    "an image with, one without": lambda: [image([[5, 5, 40, 40]], 1), image([], 255)],
    "tiny image": lambda: [image([[0, 0, 1, 1]], 0, (1, 1))] * 2,
}
ARCHITECTURES = {
    "joint": ("PanopticFPNExt", []),
    "alternate": ("PanopticFPNExt", ["MODEL.PANOPTIC_FPN.TRAINING", "alternate"]),
    "semantic": ("SemanticFPN", []),
    "two": ("TwoNetworkPanopticFPN", []),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_stays_finite(ext_cfg, architecture, name):
    ext_cfg.MODEL.META_ARCHITECTURE, options = ARCHITECTURES[architecture]
    add_panoptic_fpn_config(ext_cfg)
    ext_cfg.merge_from_list(options)
    model = build_model(ext_cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        batch = BATCHES[name]()
        with EventStorage():
            losses = model(batch)
        assert losses
        for key, loss in losses.items():
            assert torch.isfinite(loss), key
        if all((record["sem_seg"] == 255).all() for record in batch):
            assert all(v == 0 for k, v in losses.items() if "sem_seg" in k), losses
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), key
        optimizer.step()
        assert all(value.isfinite().all() for value in model.state_dict().values())
