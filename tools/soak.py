#!/usr/bin/env python
"""Train and evaluate a tiny network on and on in one process, and see whether anything grows.

    python tools/soak.py --minutes 5 [KEY VALUE ...]

After each round, a training of a few iterations and an evaluation, it counts the memory of this
process, its open files, threads and child processes. The first third of the rounds, at least 2,
warms up. Of what follows, the least of the last half is compared with the greatest of the first:
what has grown by more than the allowance of its column (16 MiB, or nothing) is a leak. Exit status:
0 without one, 1 with one, 2 where it could not begin. Linux only: it reads /proc.
"""

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch)

import argparse
import gc
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
OPTIONS = [
    *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()"),
    *("SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("DATALOADER.NUM_WORKERS", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"),
]


class Sample(NamedTuple):
    """What a process has after a round; memory in MiB."""

    memory: float
    files: int
    threads: int
    children: int


ALLOWANCES = Sample(memory=16, files=0, threads=0, children=0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rounds", type=int, help="so many, in place of --minutes")
    parser.add_argument("--config-file", default=str(REPOSITORY / "configs/quickstart.yaml"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    if not Path("/proc/self/fd").is_dir():
        raise UserError("this system has no /proc, from which memory and files are read")
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(args, Path(folder))
    grown = leaks(samples)
    print(f"grown: {', '.join(grown)}" if grown else "nothing grows")
    return 1 if grown else 0


def soak(args: argparse.Namespace, folder: Path) -> list[Sample]:
    """Rounds until the time is over, 6 at least; what was there after each."""
    sys.path.insert(0, str(REPOSITORY / "datasets"))
    from make_shapes import make_shapes

    shapes = folder / "shapes"
    make_shapes(shapes, size=(64, 64), num_images={"train": 8, "val": 4}, seed=0)
    datasets = [
        {
            "name": f"soak_{split}",
            "image_root": str(shapes / split),
            "panoptic_root": str(shapes / f"panoptic_{split}"),
            "panoptic_json": str(shapes / "annotations" / f"panoptic_{split}.json"),
        }
        for split in ("train", "val")
    ]
    options = [*OPTIONS, "OUTPUT_DIR", str(folder / "output"), "DATASETS.PANOPTIC", str(datasets)]
    options += ["DATASETS.TRAIN", "('soak_train',)", "DATASETS.TEST", "('soak_val',)", *args.opts]
    end = time.monotonic() + 60 * args.minutes
    samples: list[Sample] = []
    print("round  memory (MiB)  files  threads  children", flush=True)
    while len(samples) < (args.rounds or 6) or (not args.rounds and time.monotonic() < end):
        run_round(args.config_file, options)
        gc.collect()
        samples.append(sample())
        m, *rest = samples[-1]
        print(f"{len(samples):5}  {m:12.1f}  {rest[0]:5}  {rest[1]:7}  {rest[2]:8}", flush=True)
    return samples


def run_round(config_file: str, options: list[str]) -> None:
    """A training and an evaluation, as ``train_net.py`` does them."""
    from detectron2.engine import default_argument_parser

    from panoptic_fpn_ext.engine import Trainer, setup

    arguments = default_argument_parser().parse_args(["--config-file", config_file, *options])
    Trainer(setup(arguments)).train()


def sample() -> Sample:
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
    tasks = Path("/proc/self/task")
    children = sum(len((task / "children").read_text().split()) for task in tasks.iterdir())
    files = len(list(Path("/proc/self/fd").iterdir()))
    return Sample(memory, files, threading.active_count(), children)


def leaks(samples: list[Sample]) -> list[str]:
    """The names of what grew after warming up."""
    steady = samples[max(2, len(samples) // 3) :]
    half = len(steady) // 2
    return [
        name
        for place, (name, allowed) in enumerate(ALLOWANCES._asdict().items())
        if half
        and min(s[place] for s in steady[half:]) > max(s[place] for s in steady[:half]) + allowed
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"soak.py: error: {error}", file=sys.stderr)
        sys.exit(2)
