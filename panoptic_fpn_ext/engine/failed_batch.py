"""The batch whose loss was infinite or nan: saved with the weights of that moment, and replayed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.training_batches import seed_everything
from ..errors import UserError
from .checkpoint_files import whole_file

FILE = "failed_batch.pth"

# What batches consist of, beside tensors and arrays.
torch.serialization.add_safe_globals([BitMasks, Boxes, Instances, Keypoints, PolygonMasks])


@dataclass
class Replay:
    """What an iteration comes to.

    Attributes:
        iteration: its number.
        images: the files of the batch.
        losses: as the model gives them; none if it raised.
        error: what it raised.
        weights: names of weights and buffers that were not finite before.
        module: the first whose output is not finite, and of what class it is.
        gradients: names of parameters whose gradient is not finite.
    """

    iteration: int
    images: list[str]
    losses: dict[str, float] = field(default_factory=dict)
    error: str = ""
    weights: list[str] = field(default_factory=list)
    module: str = ""
    gradients: list[str] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        return not (self.error or self.weights or self.module or self.gradients)


def save_failed_batch(
    folder: str | os.PathLike,
    *,
    model: nn.Module,
    batch: Sequence[dict[str, Any]],
    seeds: tuple[int, ...],
    iteration: int,
) -> str:
    """Write :data:`FILE`, whole or not at all.

    Args:
        model: with the weights that the iteration began with.
        batch: what it was given.
        seeds: of the iteration, see :func:`~..data.training_batches.seed_everything`.
        iteration: its number.

    Returns:
        The path of the file.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    path = os.path.join(folder, FILE)
    # Names may be of a class of their own; text is what all can read.
    batch = [{k: str(v) if isinstance(v, str) else v for k, v in i.items()} for i in batch]
    content = {"model": model.state_dict(), "batch": batch}
    with whole_file(path) as file:
        torch.save({**content, "seeds": list(seeds), "iteration": iteration}, file)
    return path


def replay(cfg: CfgNode, path: str | os.PathLike) -> Replay:
    """Do the iteration again, without a step of the optimizer.

    Args:
        cfg: of the training; ``MODEL.DEVICE`` and ``SOLVER.AMP.ENABLED`` may be others.
        path: of :func:`save_failed_batch`.

    Raises:
        UserError: the file is another one, or of another model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        batch, seeds, iteration = content["batch"], content["seeds"], content["iteration"]
        model = build_model(cfg).train()
        model.load_state_dict(content["model"])
    except Exception as error:  # PyTorch raises whatever its unpickler does
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not the failed batch of this config: {reason}") from error
    result = Replay(iteration, [str(image.get("file_name", "an image")) for image in batch])
    result.weights = [name for name, value in model.state_dict().items() if not _is_finite(value)]
    seed_everything(*seeds)
    device = torch.device(cfg.MODEL.DEVICE).type
    is_mixed = cfg.SOLVER.AMP.ENABLED and device == "cuda"
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(_note_first(result, name)).remove)
        stack.enter_context(EventStorage(iteration))
        stack.enter_context(torch.autocast(device, torch.float16, enabled=is_mixed))
        try:
            losses = model(batch)
        except FloatingPointError as error:
            result.error = str(error)
            return result
    result.losses = {name: float(loss.detach()) for name, loss in losses.items()}
    sum(losses.values()).backward()
    result.gradients = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _is_finite(parameter.grad)
    ]
    return result


def _note_first(result: Replay, name: str) -> Any:
    def note(module: nn.Module, _: Any, output: Any) -> None:
        if not result.module and not all(map(_is_finite, _tensors(output))):
            result.module = f"{name or 'the model'} ({type(module).__name__})"

    return note


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())
