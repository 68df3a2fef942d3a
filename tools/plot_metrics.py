#!/usr/bin/env python
r"""Draw the curves of one or several runs into one PNG: losses and validation scores.

    python tools/plot_metrics.py output/quickstart --output curves.png

Reads OUTPUT_DIR/metrics.json of each run. Exit status: 0, or 2 where something is missing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from panoptic_fpn_ext import UserError

KEYS = ("total_loss", "loss_sem_seg", "loss_mask", "panoptic_seg/PQ", "sem_seg/mIoU", "segm/AP")
COLUMNS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="plot_metrics.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a PNG")
    parser.add_argument("--keys", default=",".join(KEYS), help="of metrics.json, by commas")
    args = parser.parse_args(arguments)
    try:
        runs = {str(run): read(run) for run in args.runs}
        figure = draw(runs, args.keys.split(","))
        try:
            figure.savefig(args.output, dpi=100, format="png")
        except OSError as error:
            raise UserError(f"--output {args.output}: {error.strerror}") from error
    except UserError as error:
        print(f"plot_metrics.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def read(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.json; one cut off at the end is left out.

    Raises:
        UserError: there are none.
    """
    path = run / "metrics.json"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it is written by training") from error
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no JSON: {error}") from error
    entries = [entry for entry in entries if isinstance(entry, dict) and "iteration" in entry]
    if not entries:
        raise UserError(f"{path}: no line with an iteration")
    return entries


def draw(runs: dict[str, list[dict[str, float]]], keys: Sequence[str]) -> Figure:
    """A panel for each key, a curve for each run; a key that no run has is left out.

    Raises:
        UserError: no run has any of the keys.
    """
    present = [key for key in keys if any(key in entry for run in runs.values() for entry in run)]
    if not present:
        known = sorted({key for run in runs.values() for entry in run for key in entry})
        raise UserError(f"--keys {','.join(keys)}: no run has any of them, but {', '.join(known)}")
    rows = -(-len(present) // COLUMNS)
    figure = Figure(figsize=(4.4 * min(COLUMNS, len(present)), 3.2 * rows), layout="constrained")
    for place, key in enumerate(present, 1):
        panel = figure.add_subplot(rows, min(COLUMNS, len(present)), place)
        for name, entries in runs.items():
            points = [(entry["iteration"], entry[key]) for entry in entries if key in entry]
            marker = "o" if len(points) < 30 else None
            if points:
                panel.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
        panel.set_title(key, fontsize="medium")
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(main())
