"""The benchmark, on images small enough for a test."""

import json
import os
import subprocess
import sys

import pytest

from ..conftest import REPOSITORY


def benchmark(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/benchmark.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def test_evaluation_compares_and_checks(tmp_path):
    path = tmp_path / "figures.json"
    run = benchmark(
        *("evaluation", "--sizes", "96x128", "--images", 2, "--rounds", 2, "--json", path)
    )
    assert run.returncode == 0, run.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["environment"]["cores"] == 1
    assert [c["what"] for c in content["comparisons"]] == ["PQ", "mIoU", "box and mask AP"]
    for comparison in content["comparisons"]:
        assert comparison["size"] == "96x128"
        assert comparison["same_answer"] is True
        ours, theirs = comparison["ours_ms"], comparison["detectron2_ms"]
        for times in (ours, theirs):
            assert 0 < times["lower"] <= times["median"] <= times["upper"]
        assert comparison["ratio"] == pytest.approx(theirs["median"] / ours["median"], abs=0.01)
        assert comparison["what"] in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation", "--sizes", "480"], "'480' is not HEIGHTxWIDTH"),
        (["evaluation", "--rounds", "0"], "'0' is not a positive integer"),
    ],
)
def test_mistakes_get_one_line(arguments, message):
    run = benchmark(*arguments)
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1]
