"""The command line of the dataset check."""

import json
import subprocess
import sys

from ..conftest import QUIET, REPOSITORY
from ..data.test_checks import NUM_IMAGES, plant_twenty
from ..data.tiny_dataset import TinyDataset


def check_dataset(*arguments) -> subprocess.CompletedProcess:
    environment = {**QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "tools/check_dataset.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )


def options(data: TinyDataset) -> list:
    return [
        word
        for name, path in data.paths().items()
        for word in (f"--{name}".replace("_", "-"), path)
    ]


def test_a_registered_dataset_without_faults(shapes):
    run = check_dataset("shapes_val")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("\n0 faults")


def test_twenty_planted_faults(tmp_path):
    data = TinyDataset(tmp_path / "data", NUM_IMAGES)
    plant_twenty(data)
    data.write()
    run = check_dataset(*options(data), "--workers", 2, "--json", tmp_path / "report.json")
    assert run.returncode == 1, run.stderr
    assert run.stdout.strip().endswith("\n20 faults")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["faults"]) == 20
    for fault in report["faults"]:
        assert f"{fault['file']}: " in run.stdout
        assert fault["message"] in run.stdout
    assert report["statistics"]["images"] == 23


def test_unusable_arguments_are_one_line(tmp_path):
    run = check_dataset("shapes_vall")
    assert run.returncode == 2
    assert run.stderr == (
        "check_dataset.py: error: no dataset 'shapes_vall' is registered; did you mean "
        "shapes_val?\n"
    )
