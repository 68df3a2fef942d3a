"""What can be exported, and in one line what cannot."""

import contextlib
import io
from collections.abc import Iterator

from detectron2.config import CfgNode
from torch import nn

from ..config import ARCHITECTURES
from ..errors import UserError

_POOLERS = ["ROIAlign", "ROIAlignV2"]


def check_exportable(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: the first key whose value cannot be exported.
    """
    model = cfg.MODEL
    allowed = {
        "MODEL.META_ARCHITECTURE": (model.META_ARCHITECTURE, list(ARCHITECTURES)),
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, ["BGR", "RGB"]),
    }
    if model.META_ARCHITECTURE != "SemanticFPN" and model.ROI_HEADS.NUM_CLASSES:
        allowed |= {
            "MODEL.PROPOSAL_GENERATOR.NAME": (model.PROPOSAL_GENERATOR.NAME, ["RPN"]),
            "MODEL.ANCHOR_GENERATOR.NAME": (
                model.ANCHOR_GENERATOR.NAME,
                ["DefaultAnchorGenerator"],
            ),
            "MODEL.ROI_HEADS.NAME": (
                model.ROI_HEADS.NAME,
                ["StandardROIHeads", "CascadeROIHeads"],
            ),
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": (model.ROI_BOX_HEAD.POOLER_TYPE, _POOLERS),
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE": (model.ROI_MASK_HEAD.POOLER_TYPE, _POOLERS),
            "MODEL.KEYPOINT_ON": (model.KEYPOINT_ON, [False]),
        }
    for key, (value, values) in allowed.items():
        if value not in values:
            raise UserError(
                f"{key} {value} cannot be exported: {' or '.join(map(str, values))} can"
            )
    if any(model.RESNETS.DEFORM_ON_PER_STAGE):
        raise UserError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE {list(model.RESNETS.DEFORM_ON_PER_STAGE)} cannot "
            "be exported: the operator of deformable convolutions is Detectron2's own, and no "
            "runtime has it; set all to False and train anew"
        )


@contextlib.contextmanager
def naming_the_part(cfg: CfgNode, model: nn.Module) -> Iterator[None]:
    """Within it, what the exporter cannot take becomes one line with the key of that part.

    Raises:
        UserError: see there.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints the whole graph
            yield
    except (UserError, OSError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{_key_of(cfg, model)} cannot be exported: {reason}") from error


def _key_of(cfg: CfgNode, model: nn.Module) -> str:
    """The key of the first part that is not of Detectron2 or of this package; of all, if none."""
    parts = {
        "backbone": f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME}",
        "sem_seg_head": f"MODEL.SEM_SEG_HEAD.NAME {cfg.MODEL.SEM_SEG_HEAD.NAME}",
        "rpn_head": f"MODEL.RPN.HEAD_NAME {cfg.MODEL.RPN.HEAD_NAME}",
        "box_head": f"MODEL.ROI_BOX_HEAD.NAME {cfg.MODEL.ROI_BOX_HEAD.NAME}",
        "mask_head": f"MODEL.ROI_MASK_HEAD.NAME {cfg.MODEL.ROI_MASK_HEAD.NAME}",
    }
    known = ("detectron2.", "panoptic_fpn_ext.", "torch.", "fvcore.", "torchvision.")
    for path, module in model.named_modules():
        if not type(module).__module__.startswith(known):
            for name, key in parts.items():
                if name in path.split("."):
                    return key
    return f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}"
