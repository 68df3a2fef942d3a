"""What several evaluators share: checks, averages, tables in logs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from ..errors import UserError


def check_size(source: str, size: Sequence[int], gt_source: str, gt_size: Sequence[int]) -> None:
    """Hold the size of a prediction against that of its ground truth, both (height, width).

    Raises:
        UserError: they differ.
    """
    if tuple(size) != tuple(gt_size):
        raise UserError(
            f"{source} is {size[0]} x {size[1]} pixels (height x width), "
            f"but {gt_source} is {gt_size[0]} x {gt_size[1]}"
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


def metrics_table(scores: Mapping[str, float], metrics: Sequence[str]) -> str:
    """A table of some metrics, in one row."""
    return pipe_table(metrics, [[scores[metric] for metric in metrics]])


def classes_table(
    scores: Mapping[str, float], metrics: Sequence[str], names: Iterable[str], kind: str = "class"
) -> str:
    """A table of ``<metric>-<name>`` of each class, empty where there is none."""
    rows = [(name, *(scores.get(f"{metric}-{name}") for metric in metrics)) for name in names]
    return pipe_table((kind, *metrics), rows)
