"""tools/check_resume.py: that it kills, and sees what differs."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from ..conftest import CONFIG, REPOSITORY, SMALL

spec = importlib.util.spec_from_file_location(
    "check_resume", REPOSITORY / "tools" / "check_resume.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_all_that_is_in_a_checkpoint_is_compared():
    checkpoint = {"model": {"a": torch.ones(2)}, "groups": [{"lr": 0.1}, (1, None)], "n": 3}
    found = dict(tool.leaves(checkpoint))
    assert list(found) == [".model.a", ".groups[0].lr", ".groups[1][0]", ".groups[1][1]", ".n"]
    assert all(tool.same(value, value) for value in found.values())
    for one, other in ((torch.ones(2), torch.ones(3)), (torch.ones(1), 1.0), (0.1, 0.2), (None, 0)):
        assert not tool.same(one, other)


@pytest.mark.slow
def test_a_training_is_killed_and_ends_alike(shapes, tmp_path):
    run = subprocess.run(
        [
            *(sys.executable, "tools/check_resume.py", "--config-file", CONFIG, "--kills", "2"),
            *("--output", str(tmp_path), *SMALL, "SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "(9,)"),
            *("SOLVER.CHECKPOINT_PERIOD", "2", "DATASETS.TEST", "()"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert re.search(r"killed [12] times", run.stdout)
    assert re.search(r"\n0 of \d{3} tensors differ, 0 of \d{3} values\n", run.stdout)


def test_mistakes_are_one_line(tmp_path):
    run = subprocess.run(
        [
            *(sys.executable, "tools/check_resume.py", "--config-file", "nowhere.yaml"),
            *("--output", str(tmp_path)),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "--config-file nowhere.yaml: no such file" in run.stderr.splitlines()[-1]
