"""What the evaluators share: gathering from processes, checks, averages, tables in logs."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from detectron2.utils import comm
from tabulate import tabulate

from ..errors import UserError

Part = TypeVar("Part")


def gather(part: Part, *, distributed: bool) -> list[Part] | None:
    """The parts of all processes, in the first of them; None in the others.

    Args:
        part: what this process has counted; must be picklable.
        distributed: without, this process's part is all.
    """
    if not distributed:
        return [part]
    comm.synchronize()
    parts = comm.gather(part)
    return parts if comm.is_main_process() else None


def gather_images(
    images: Mapping[Hashable, Part], *, distributed: bool
) -> dict[Hashable, Part] | None:
    """As :func:`gather`, of results by image: each image once."""
    parts = gather(images, distributed=distributed)
    if parts is None:
        return None
    return {key: image for part in parts for key, image in part.items()}


def check_size(
    record: Mapping[str, Any], size: Sequence[int], gt_source: str, gt_size: Sequence[int]
) -> None:
    """Hold the size of a prediction against that of its ground truth, both (height, width).

    Raises:
        UserError: they differ.
    """
    if tuple(size) != tuple(gt_size):
        raise UserError(
            f"the prediction for {record['file_name']} is {size[0]} x {size[1]} pixels "
            f"(height x width), but {gt_source} is {gt_size[0]} x {gt_size[1]}"
        )


def mean(values: Iterable[float]) -> float:
    """The mean of those that are not nan; nan if all are."""
    valid = [value for value in values if not math.isnan(value)]
    return math.fsum(valid) / len(valid) if valid else math.nan


def pipe_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, its numbers with three decimals."""
    return tabulate(
        rows, headers=headers, tablefmt="pipe", floatfmt=".3f", stralign="center", numalign="center"
    )
