#!/usr/bin/env python
"""Kill a training again and again, resume it, and compare it with one that was left alone.

    python tools/check_resume.py --config-file configs/quickstart.yaml --kills 10 \
        SOLVER.MAX_ITER 60 SOLVER.CHECKPOINT_PERIOD 5 DATASETS.TEST "()"

Both are ordinary `train_net.py` runs on CPUs, of one seed, deterministic. SIGKILL comes at random
moments, checkpoints being written among them. Exit status: 0 if the weights, the optimizer and all
else in the last checkpoint are the same to the last bit, 1 if not.
"""

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch)

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the moments")
    parser.add_argument("--output", type=Path, default=Path("output/check_resume"))
    parser.add_argument("--num-gpus", type=int, default=1, help="processes, on CPUs")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    if args.kills < 1:
        raise UserError(f"--kills {args.kills}: must be at least 1")
    command = [sys.executable, "train_net.py", "--config-file", args.config_file]
    command += ["--num-gpus", str(args.num_gpus)]
    options = [*args.opts, "SEED", str(args.seed), "DETERMINISTIC", "True", "MODEL.DEVICE", "cpu"]
    folders = [args.output / name for name in ("alone", "killed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

    logs = [folder.with_suffix(".txt") for folder in folders]
    args.output.mkdir(parents=True, exist_ok=True)
    with running([*command, *options, "OUTPUT_DIR", str(folders[0])], logs[0]) as run:
        wait_for_training(run, logs[0])
        began = time.monotonic()
        run.wait()
        duration = time.monotonic() - began
    check(run, logs[0])
    print(f"left alone: {duration:.0f} seconds of training")

    moments = random.Random(args.seed)
    command = [*command, "--resume", *options, "OUTPUT_DIR", str(folders[1])]
    kills = 0
    for _ in tqdm(range(args.kills), "kills"):
        with running(command, logs[1]) as run:
            wait_for_training(run, logs[1])
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(moments.uniform(0, 1.5 * duration / args.kills))
            kills += run.poll() is None
    with running(command, logs[1]) as run:
        run.wait()
    check(run, logs[1])
    print(f"killed {kills} times")

    alone, resumed = (dict(leaves(read(folder / "model_final.pth"))) for folder in folders)
    differ = [
        name
        for name in sorted({*alone, *resumed})
        if name not in alone or name not in resumed or not same(alone[name], resumed[name])
    ]
    for name in differ[:10]:
        print(name)
    number = sum(torch.is_tensor(value) for value in alone.values())
    different = sum(torch.is_tensor(alone.get(name)) for name in differ)
    print(f"{different} of {number} tensors differ, {len(differ)} of {len(alone)} values")
    return 1 if differ else 0


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command with a group of processes of its own; in the end, kill what is left of them."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_training(process: subprocess.Popen, log: Path) -> None:
    while process.poll() is None and "Starting training" not in log.read_text():
        time.sleep(0.05)


def check(process: subprocess.Popen, log: Path) -> None:
    if process.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"train_net.py failed with status {process.returncode}: {last}; see {log}")


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors and numbers of a checkpoint, by where they are in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}[{index}]")
    else:
        yield name, value


def same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"check_resume.py: error: {error}", file=sys.stderr)
        sys.exit(2)
