"""The README's Python, run as it stands there."""

import re

import cv2
import pytest

from .conftest import REPOSITORY


@pytest.fixture
def example() -> str:
    """The README's first block of Python."""
    return re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)[1]


def test_predicting_and_drawing(example, trained, shapes, tmp_path, monkeypatch):
    assert len([line for line in example.splitlines() if line]) <= 17
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "quickstart").symlink_to(trained)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "shapes").symlink_to(shapes)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["panoptic_seg"].shape == (64, 64)
    assert cv2.imread("prediction.png").shape == (256, 256, 3)
