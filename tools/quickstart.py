#!/usr/bin/env python
"""Make Shapes, train on it, evaluate, draw: what `make quickstart` runs.

Each step is an ordinary command, printed before it runs. Run again, it goes on where it was cut
off; remove output/quickstart to train anew.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

CONFIG = "configs/quickstart.yaml"
OUTPUT = Path("output/quickstart")
WEIGHTS = OUTPUT / "model_final.pth"
PICTURE = OUTPUT / "predictions.png"
PROGRESS = ("Shapes: ", "  eta: ", "Inference done", "images, ")  # in lines worth showing


def main() -> None:
    began = time.monotonic()
    train = ["train_net.py", "--config-file", CONFIG]
    run("datasets/make_shapes.py")
    run(*train, "--resume")
    run(*train, "--eval-only", "MODEL.WEIGHTS", WEIGHTS)
    draw = ["--config-file", CONFIG, "--output", PICTURE, "MODEL.WEIGHTS", WEIGHTS]
    run("tools/draw_predictions.py", *draw)

    metrics = OUTPUT / "inference" / "metrics.json"
    print(f"\n{table(json.loads(metrics.read_text()))}\n")
    for what, path in (
        ("scores", metrics),
        ("report", metrics.with_name("report.html")),
        ("checkpoint", WEIGHTS),
        ("config", OUTPUT / "config.yaml"),
        ("log", OUTPUT / "log.txt"),
        ("pictures", PICTURE),
    ):
        print(f"{what:<11}{path}")
    print(f"{time.monotonic() - began:.0f} seconds")


def run(*command: str | Path) -> None:
    """Run a Python command; show its progress, and the end of all it said if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ python {' '.join(words)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if any(mark in line for mark in PROGRESS):
            print(line, end="", flush=True)
    if process.wait():
        print("".join(lines[-40:]), file=sys.stderr)
        sys.exit(f"quickstart.py: error: `{words[0]}` failed with status {process.returncode}")


def table(metrics: dict[str, float]) -> str:
    """The scores of ``metrics.json``, in percent."""
    rows = [
        (name, *(metrics[f"panoptic_seg/{score}{suffix}"] for score in ("PQ", "SQ", "RQ")))
        for name, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st"))
    ]
    rows[0] += (metrics["sem_seg/mIoU"], metrics["segm/AP"])
    headers = ("", "PQ", "SQ", "RQ", "mIoU", "mask AP")
    return tabulate(rows, headers, tablefmt="github", floatfmt=".1f")


if __name__ == "__main__":
    main()
