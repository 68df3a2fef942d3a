"""A training that is told to stop saves what it has, and goes on from there."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from panoptic_fpn_ext.engine.interruption import StopOnSignal

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


class BusyStream(io.StringIO):
    """As a file of Python's, which a signal may interrupt while it writes."""

    def __init__(self, interrupt) -> None:
        super().__init__()
        self._interrupt, self._is_busy = interrupt, False

    def write(self, text: str) -> int:
        if self._is_busy:
            raise RuntimeError("reentrant call")
        self._is_busy = True
        if interrupt := self._interrupt:
            self._interrupt = None
            interrupt()
        self._is_busy = False
        return super().write(text)


def test_a_signal_may_come_while_a_line_is_logged(capsys):
    stream = BusyStream(lambda: StopOnSignal()._receive(signal.SIGTERM, None))
    logger, handler = logging.getLogger("panoptic_fpn_ext"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning("a line")
        deadline = time.monotonic() + 10
        while stream.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == "a line\nSIGTERM: stopping after this iteration\n"
    assert "reentrant" not in capsys.readouterr().err
