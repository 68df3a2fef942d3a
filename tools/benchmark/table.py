"""A short table of what the other commands have written."""

import argparse
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .results import read


def table(args: argparse.Namespace) -> int:
    """Print a row for each whole thing that was measured: both times, their ratio and memory."""
    rows = [row for file in args.files for row in rows_of(file)]
    headers = ["file", "", "outputs", "ours", "Detectron2", "ratio", "memory", "same answer"]
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))
    return 0


def rows_of(file: Path) -> list[list[Any]]:
    content, comparisons = read(file)
    rows = []
    for c in comparisons:
        detections = f", {c.detections} detections" if c.detections else ""
        rows.append(
            [
                file.stem,
                f"{c.what}, {c.size}{detections}",
                c.outputs or "",
                *(f"{times.median:.1f} ms" for times in (c.ours_ms, c.detectron2_ms)),
                f"{c.ratio:.2f}",
                "" if c.memory_share is None else f"{c.memory_share:.2f}",
                "yes" if c.same_answer else "NO",
            ]
        )
    for kind in ("launches", "waits"):
        for what, counts in content.get(kind, {}).items():
            ours, theirs = counts["ours"], counts["detectron2"]
            ratio = f"{theirs / ours:.2f}" if ours else ""
            same = "yes" if content["same_answer"] else "NO"
            rows.append([file.stem, f"{kind}, {what}", "", ours, theirs, ratio, "", same])
    return rows
