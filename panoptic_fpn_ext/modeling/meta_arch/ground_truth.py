"""What the meta-architectures train on."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError

# What Detectron2's mapper makes them of.
_OF_DETECTRON2 = {"instances": "annotations", "sem_seg": "sem_seg_file_name"}


def ground_truth(batched_inputs: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """The ground truth of each image.

    Args:
        batched_inputs: what a mapper made of the records.
        name: ``"instances"`` or ``"sem_seg"``.

    Raises:
        UserError: an image has none.
    """
    for record in batched_inputs:
        if name not in record:
            raise UserError(
                f"{record.get('file_name', 'an image')}: no {name!r} to train on: map records with "
                "PanopticFPNMapper, as panoptic_fpn_ext.engine.Trainer does; Detectron2's "
                f"DatasetMapper needs {_OF_DETECTRON2[name]!r} in them"
            )
    return [record[name] for record in batched_inputs]
