"""A short table of what the other commands have written."""

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from panoptic_fpn_ext import UserError

WHOLE = ("whole image", "training step", "semantic head's step", "data")


def table(args: argparse.Namespace) -> int:
    """Print a row for each whole thing that was measured: both times, their ratio and memory."""
    rows = [row for file in args.files for row in rows_of(file)]
    headers = ["file", "", "outputs", "ours", "Detectron2", "ratio", "memory", "same answer"]
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))
    return 0


def rows_of(file: Path) -> list[list[Any]]:
    """
    Raises:
        UserError: not a file that a command of the benchmark has written.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(content, dict) or "environment" not in content:
        raise UserError(f"{file}: not written by this benchmark: it has no environment")
    rows = []
    for c in content.get("comparisons", []):
        if c["what"].startswith(WHOLE):
            detections = f", {c['detections']} detections" if c["detections"] else ""
            share = "" if c["memory_share"] is None else f"{c['memory_share']:.2f}"
            times = [f"{c[side]['median']:.1f} ms" for side in ("ours_ms", "detectron2_ms")]
            rows.append(
                [
                    file.stem,
                    f"{c['what']}, {c['size']}{detections}",
                    c["outputs"] or "",
                    *times,
                    f"{c['ratio']:.2f}",
                    share,
                    "yes" if c["same_answer"] else "NO",
                ]
            )
    for kind in ("launches", "waits"):
        for what, counts in content.get(kind, {}).items():
            ours, theirs = counts["ours"], counts["detectron2"]
            same = "yes" if content["same_answer"] else "NO"
            rows.append(
                [file.stem, f"{kind}, {what}", "", ours, theirs, f"{theirs / ours:.2f}", "", same]
            )
    return rows
