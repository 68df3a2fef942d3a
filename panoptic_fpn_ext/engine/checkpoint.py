"""Checkpoints: whole files, safely read; what does not fit the model is said, not skipped."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..errors import UserError
from .checkpoint_files import DamagedCheckpoint, is_whole, read_checkpoint, whole_file

BEST = "model_best"
"""The name of the checkpoint with the best score."""

# Where class counts show: pattern of the parameter, classes of a first dimension, kind, key.
_CLASSIFIERS = (
    (
        re.compile(r"box_predictor(\.\d+)?\.cls_score\.(weight|bias)$"),
        lambda size: size - 1,  # the last is background
        "thing",
        "MODEL.ROI_HEADS.NUM_CLASSES",
    ),
    (
        re.compile(r"sem_seg_head\.predictor\.(weight|bias)$"),
        lambda size: size,
        "semantic",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    ),
)


class PanopticFPNCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which says clearly what of a checkpoint does not fit the model.

    Fine-tuning from a checkpoint with other classes is a warning; evaluating with it, and resuming
    from it, an error. Nothing that a file holds is run. A checkpoint is there whole or not at all,
    and one that got damaged since is not what a training ends with: that goes on from the one
    before. The best one is never what ``last_checkpoint`` names.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        backbone_suffices: bool = False,
        **arguments: Any,
    ) -> None:
        """
        Args:
            model: the model to load into.
            save_dir: folder of the checkpoints.
            complete: whether every parameter must come from the checkpoint, as in evaluation.
            backbone_suffices: whether a checkpoint of nothing but a backbone counts as complete.
            arguments: those of :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **arguments)
        self._always_complete = complete
        self._backbone_suffices = backbone_suffices
        self._complete, self._path = complete, ""
        self._parsed_url_during_load = None
        self._found_whole: dict[str, tuple[int, int]] = {}

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's.

        Raises:
            UserError: it cannot be written; the checkpoints before are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        for leftover in Path(self.save_dir).glob("*.pth.partial"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with whole_file(path) as file:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, file)
        if name != BEST:
            self.tag_last_checkpoint(f"{name}.pth")

    def keep_newest(self, number: int, iteration: int) -> None:
        """Remove the numbered checkpoints of a training but for the newest.

        One that is damaged does not count, and none is removed for its sake. Those without a
        number, the best and the final one, stay, and so do those of later iterations, which a
        training that fell back to an earlier one has not come to yet.

        Args:
            number: how many to keep, at least 1.
            iteration: the one that the training is at.
        """
        if not self.save_to_disk:
            return
        numbers = {path: _number(path) for path in self._files()}
        passed = [path for path, at in numbers.items() if at is not None and at <= iteration]
        for path in sorted(passed, key=numbers.__getitem__, reverse=True):
            if number > 0:
                number -= self._is_whole(path)
                continue
            try:
                os.unlink(path)
            except OSError as error:
                self.logger.warning(f"{path}: cannot be removed ({error.strerror})")

    def _is_whole(self, path: str) -> bool:
        """Whether a checkpoint is; read once, as long as it does not change."""
        status = os.stat(path)
        version = status.st_mtime_ns, status.st_size
        if self._found_whole.get(path) == version:
            return True
        if not is_whole(path):
            self.logger.warning(f"{path}: damaged; an earlier checkpoint is kept in its place")
            return False
        self._found_whole[path] = version
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with whole_file(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def get_checkpoint_file(self) -> str:
        try:
            name = Path(self.save_dir, "last_checkpoint").read_text(errors="replace").strip()
        except OSError:
            return ""
        return os.path.join(self.save_dir, name)

    def has_checkpoint(self) -> bool:
        return super().has_checkpoint() or bool(self._files())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's; from the newest checkpoint that is whole.

        Raises:
            UserError: none is whole; or see :meth:`load`.
        """
        if not resume or not self.has_checkpoint():
            return self.load(path, checkpointables=[])
        last = self.get_checkpoint_file()
        try:
            if os.path.isfile(last):
                return self.load(last)
            self.logger.warning(
                f"{self.save_dir}/last_checkpoint: there is no {last or 'such file'}"
            )
        except DamagedCheckpoint as error:
            self.logger.warning(str(error))
        others = [path for path in self._files() if path != last]
        for other in sorted(others, key=_iteration, reverse=True):
            try:
                loaded = self.load(other)
            except DamagedCheckpoint as error:
                self.logger.warning(str(error))
            else:
                self.logger.warning(f"Going on from {other}, the newest checkpoint that is whole")
                return loaded
        raise UserError(
            f"OUTPUT_DIR {self.save_dir}: none of its checkpoints is whole; --overwrite begins anew"
        )

    def _files(self) -> list[str]:
        """The files of checkpoints in the folder."""
        return [str(path) for path in Path(self.save_dir).glob("model_*.pth") if self.save_dir]

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As Detectron2's.

        Raises:
            UserError: no such file, one that is no checkpoint or asks for more than weights, or
                weights that are infinite or nan; or, if the checkpoint has to be complete or the
                training state is loaded too, one that lacks parameters or has others' shapes.
        """
        resumes = bool(self.checkpointables) and checkpointables != []
        self._complete, self._path = self._always_complete or resumes, path
        if path and "://" not in path and not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        try:
            self.path_manager.get_local_path(path)
        except Exception as error:  # whatever a protocol raises
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: cannot be fetched ({reason}); fetch it elsewhere, and give the file"
            ) from error
        self._parsed_url_during_load = None  # Detectron2's, which an error leaves as it is
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_checkpoint(filename, self._path)
        if author := content.get("__author__"):
            self.logger.info(f"Reading a file from '{author}'")
        # On Detectron2's main branch FILE?matching_heuristics=True is a path.
        url = self._parsed_url_during_load
        if url and parse_qs(url.query).get("matching_heuristics") == ["True"]:
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        for name, value in checkpoint["model"].items():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(f"{self._path}: {name} is infinite or nan; use an earlier one")
        may_lack = not self._complete or (self._backbone_suffices and _is_backbone(checkpoint))
        incompatible = super()._load_model(checkpoint)
        classes = _differing_classes(incompatible.incorrect_shapes)
        wrong = [*classes.values()]
        if not wrong and self._complete:
            wrong = [
                f"{name} has shape {list(theirs)}, but {list(ours)} in the model: is the config "
                "the one it was trained with?"
                for name, theirs, ours in incompatible.incorrect_shapes
            ]
        if wrong and self._complete:
            raise UserError(f"{self._path}: {wrong[0]}")
        for line in wrong:
            self.logger.warning(f"{self._path}: {line}; these layers are trained from scratch")
        if not may_lack:
            self._refuse_missing(incompatible.missing_keys)
        return incompatible

    def _refuse_missing(self, keys: list[str]) -> None:
        # state_dict has shared parameters under each of their names; one of them is enough.
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(p) for name, p in parameters.items() if name not in keys}
        missing = [k for k in keys if k in parameters and id(parameters[k]) not in loaded]
        if missing:
            raise UserError(
                f"{self._path}: lacks {len(missing)} of the model's {len(parameters)} parameters, "
                f"{missing[0]} first: is the config the one it was trained with?"
            )


def trained_model(cfg: CfgNode, *, resume: bool = False) -> nn.Module:
    """The model of a config with all its weights, for inference.

    Args:
        cfg: its ``MODEL.WEIGHTS`` are loaded,
        resume: or, if there is one, the last checkpoint of its ``OUTPUT_DIR``.

    Raises:
        UserError: see :meth:`PanopticFPNCheckpointer.load`.
    """
    model = build_model(cfg).eval()
    checkpointer = PanopticFPNCheckpointer(model, cfg.OUTPUT_DIR, complete=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


def _iteration(path: str) -> int:
    """After which a checkpoint was saved; -1 if it is damaged."""
    if (number := _number(path)) is not None:
        return number
    try:
        return read_checkpoint(path).get("iteration", -1)
    except UserError:
        return -1


def _number(path: str) -> int | None:
    """The iteration in its name, if there is one."""
    number = re.search(r"model_(\d+)\.pth$", path)
    return int(number[1]) if number else None


def _is_backbone(checkpoint: dict[str, Any]) -> bool:
    """Whether it has nothing but a backbone: of ImageNet, or cut out of a model of Detectron2."""
    if checkpoint.get("matching_heuristics", False):
        return True
    return all(name.removeprefix("module.").startswith("backbone.") for name in checkpoint["model"])


def _differing_classes(
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> dict[str, str]:
    """For each class count that differs one line, by key of the config."""
    lines = {}
    for name, theirs, ours in incorrect_shapes:
        for pattern, classes, kind, key in _CLASSIFIERS:
            if pattern.search(name) and theirs[1:] == ours[1:]:
                lines.setdefault(
                    key,
                    f"{name} is for {classes(theirs[0])} {kind} classes, but the model has "
                    f"{classes(ours[0])} ({key})",
                )
    return lines
