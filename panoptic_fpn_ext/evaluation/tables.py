"""Tables in logs, as Detectron2 prints them."""

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate


def pipe_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, its numbers with three decimals."""
    return tabulate(
        rows, headers=headers, tablefmt="pipe", floatfmt=".3f", stralign="center", numalign="center"
    )
