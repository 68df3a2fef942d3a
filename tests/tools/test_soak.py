"""What grows is found; what wavers, or grew while it warmed up, is not."""

import importlib.util
import os
import subprocess
import sys

import pytest

from ..conftest import REPOSITORY

spec = importlib.util.spec_from_file_location("soak", REPOSITORY / "tools" / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)
STEADY = soak.Sample(memory=900.0, files=20, threads=5, children=0)


def series(**grows: list) -> list:
    length = len(next(iter(grows.values())))
    return [STEADY._replace(**{k: v[n] for k, v in grows.items()}) for n in range(length)]


@pytest.mark.parametrize(
    "grows",
    [
        {"memory": [900.0 + 20 * k for k in range(9)]},
        {"files": [20 + k for k in range(9)]},
        {"threads": [5 + k for k in range(9)]},
        {"children": list(range(9))},
    ],
)
def test_what_grows_is_found(grows):
    assert soak.leaks(series(**grows)) == list(grows)


@pytest.mark.parametrize(
    "grows",
    [
        {"memory": [500.0, 700, 900, 901, 900, 908, 903, 911, 905]},
        {"files": [20, 40, 41, 39, 41, 40, 39, 41, 40]},
        {"threads": [1, 3, 5, 5, 5, 5, 5, 5, 5]},
        {"children": [0, 1, 0, 1, 0, 0, 1, 0, 1]},
    ],
)
def test_what_wavers_is_not(grows):
    assert soak.leaks(series(**grows)) == []


def test_this_process_is_counted():
    before = soak.sample()
    with (REPOSITORY / "README.md").open(), (REPOSITORY / "LICENSE").open():
        within = soak.sample()
    assert within.files == before.files + 2
    assert before.memory > 10 and before.threads >= 1


@pytest.mark.slow
def test_it_runs_and_finds_nothing():
    run = subprocess.run(
        [sys.executable, "tools/soak.py", "--rounds", "2", "MODEL.DEVICE", "cpu"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("nothing grows")
