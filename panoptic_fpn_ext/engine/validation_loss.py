"""The losses of a model on a test dataset, at which nothing about the model changes."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..data import PanopticFPNMapper
from ..data.augmentation import build_augmentation
from ..data.training_batches import same_random_state, seed_everything

logger = logging.getLogger(__name__)


@torch.no_grad()
def validation_losses(cfg: CfgNode, model: nn.Module, dataset_name: str) -> dict[str, float]:
    """The mean of the training losses over the images of a test dataset.

    Images are those of evaluation, one at a time and not augmented; batch normalization has the
    statistics of inference, and dropout is off. Which anchors and proposals are sampled follows
    from the number of the image: the losses are the same every time, in any number of processes.
    With alternating training all tasks count.

    Args:
        cfg: the config of the run.
        model: in training or inference; its parameters, buffers and modes, and the random state,
            are afterwards what they were.
        dataset_name: a registered dataset with ground truth.

    Returns:
        The mean of each loss, weighted as in training, and their sum ``total_loss``: nan if the
        losses of an image are. In the main process alone; elsewhere nothing.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # which waits for no other process
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with same_random_state(), torch.random.fork_rng(devices), _for_losses(model):
        found = {
            number: _losses(model, number, record)
            for ((number, record),) in _ground_truth(cfg, dataset_name)
        }
    everywhere = comm.gather(found)
    if not comm.is_main_process():
        return {}
    images = {number: losses for part in everywhere for number, losses in part.items()}
    names = dict.fromkeys(name for number in sorted(images) for name in images[number])
    means = {
        name: math.fsum(losses.get(name, 0.0) for losses in images.values()) / len(images)
        for name in names
    }
    means = {"total_loss": math.fsum(means.values()), **means}
    terms = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
    logger.info("Losses on the %d images of %s: %s", len(images), dataset_name, terms)
    return means


def _ground_truth(cfg: CfgNode, dataset_name: str) -> Any:
    """A loader of lists of one pair: the number of an image, and what the model trains on."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = PanopticFPNMapper(cfg, is_train=True, augmentations=augmentations)
    records = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    return build_detection_test_loader(
        list(enumerate(records)), mapper=_Numbered(mapper), num_workers=cfg.DATALOADER.NUM_WORKERS
    )


class _Numbered:
    """A mapper of pairs of a number and a record."""

    def __init__(self, mapper: PanopticFPNMapper) -> None:
        self._mapper = mapper

    def __call__(self, pair: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        return pair[0], self._mapper(pair[1])


def _losses(model: nn.Module, number: int, record: dict[str, Any]) -> dict[str, float]:
    seed_everything(number)
    try:
        with EventStorage(1):  # what heads write there is not kept
            losses = {name: float(loss) for name, loss in model([record]).items()}
    except FloatingPointError:  # Detectron2's RPN, of boxes that are no numbers
        losses = {"loss_rpn_loc": math.nan}
    if not all(map(math.isfinite, losses.values())):
        logger.warning("%s: its losses are infinite or nan", record.get("file_name", "an image"))
    return losses


@contextmanager
def _for_losses(model: nn.Module) -> Iterator[None]:
    """While in it, a model returns losses and computes as in inference."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    schedules = {
        module: module.training_schedule
        for module in modes
        if hasattr(module, "training_schedule")  # of PanopticFPNExt
    }
    if not model.training:
        model.train()
    for module in modes:
        if isinstance(module, (_NormBase, _DropoutNd)):
            module.training = False
    for module in schedules:
        module.training_schedule = "joint"
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, schedule in schedules.items():
            module.training_schedule = schedule
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
