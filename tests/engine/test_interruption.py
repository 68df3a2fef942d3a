"""A training that is told to stop saves what it has, and goes on from there."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from ..conftest import CONFIG, REPOSITORY, SMALL, train_net

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_iteration_and_saves(shapes, tmp_path, name):
    number = signal.Signals[name]
    arguments = "--config-file", CONFIG, *SMALL, "OUTPUT_DIR", str(tmp_path), "SOLVER.STEPS", "(5,)"
    process = subprocess.Popen(
        [sys.executable, "-u", "train_net.py", *arguments, "SOLVER.MAX_ITER", "100000"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "iter: 19 " in line:
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors[-3000:]
    line = errors.strip().splitlines()[-1]
    assert "Traceback" not in output + errors
    last = int(re.search(rf"stopped by {name} after iteration (\d+), saved", line)[1])
    saved = torch.load(tmp_path / f"model_{last:07d}.pth", weights_only=False)
    assert saved["iteration"] == last >= 19
    assert saved["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == last + 1

    if name != "SIGTERM":
        return  # resuming is the same after all
    run = train_net("--resume", *arguments, "SOLVER.MAX_ITER", last + 3, "DATASETS.TEST", "()")
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"Starting training from iteration {last + 1}" in run.stdout
