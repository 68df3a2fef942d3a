"""The Makefile, with a make and Pythons that only pretend."""

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import REPOSITORY

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("here", "failing", "code"),
    [(PYTHONS, "", 0), (["3.10", "3.13"], "", 0), (PYTHONS[1:], "3.12", 2), ([], "", 2)],
)
def test_matrix_runs_the_pythons_that_are_here(here, failing, code, tmp_path: Path):
    for version in PYTHONS:
        script(tmp_path / f"python{version}", f"exit {0 if version in here else 127}")
    script(tmp_path / "nested", f'echo "$@"; case "$*" in *python{failing}\\ *) exit 2;; esac')
    # Of the make that may run the tests itself it is to know nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "test-matrix", f"MAKE={tmp_path / 'nested'}"],
        cwd=REPOSITORY,
        env={**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    results = [
        "not here: skipped" if v not in here else "FAILED" if v == failing else "passed"
        for v in PYTHONS
    ]
    assert done.stdout.splitlines() == [
        *(f"env test PYTHON=python{version} VENV=.venv-{version}" for version in here),
        "",
        *(f"Python {v}  {result}" for v, result in zip(PYTHONS, results, strict=True)),
    ]
