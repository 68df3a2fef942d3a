"""Loading checkpoints that may be another model's: what does not fit is said, not skipped."""

import os
import re
from typing import Any
from urllib.parse import parse_qs

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..errors import UserError
from .checkpoint_files import read_checkpoint

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
    from it, an error.
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
