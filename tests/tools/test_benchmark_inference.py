"""What the benchmark measures of inference, on images small enough for a test."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ..conftest import REPOSITORY

MB = 2**20


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")


@pytest.fixture
def stages():
    from benchmark.frame import Stages

    return Stages(torch.device("cpu"))


class TestMemory:
    def test_what_is_freed_in_a_stage_does_not_hide_what_it_makes(self, stages):
        def run():
            stages.enter("one")
            arguments = torch.empty(8 * MB, dtype=torch.uint8)
            stages.enter("two")
            del arguments
            made = [torch.empty(MB, dtype=torch.uint8) for _ in range(3)]
            del made[:]
            return torch.empty(2 * MB, dtype=torch.uint8)

        one, two = stages.memory(run)
        assert (one.stage, one.low, one.peak, one.rise) == ("one", 0, 8 * MB, 8 * MB)
        assert (two.stage, two.low, two.peak, two.rise) == ("two", 0, 8 * MB, 3 * MB)

    def test_resident_memory_has_what_other_libraries_allocate(self, stages):
        def run():
            stages.enter("before")
            np.ones(96 * MB, np.uint8)
            stages.enter("after")
            np.ones(32 * MB, np.uint8)

        resident = stages.resident(run, since="after")
        if resident is None:
            pytest.skip("this system does not tell")
        assert 28 * MB < resident < 48 * MB

    def test_none_where_the_system_does_not_tell(self, stages, monkeypatch):
        from benchmark import frame

        def refuse():
            raise PermissionError

        monkeypatch.setattr(frame, "_forget_peak", refuse)
        assert stages.resident(lambda: None, since="any") is None


def plan(*arguments):
    from benchmark.__main__ import parser
    from benchmark.inference import plan

    found = plan(parser().parse_args(["inference", *map(str, arguments)]))
    return [(str(s), s.num_classes, detections) for s, detections in found.items()]


class TestPlan:
    def test_every_combination(self):
        assert plan("--sizes", "coco", "8x9", "--detections", 3, 5) == [
            ("800x1216 to 480x640", 54, [3, 5]),
            ("8x9", 54, [3, 5]),
        ]
        assert plan() == [
            ("800x1216 to 480x640", 54, [10, 30, 100]),
            ("1024x2048", 19, [10, 30, 100]),
        ]

    def test_growth_changes_one_at_a_time(self):
        growth = ("--growth", "--sizes", "8x9", "9x9", "--detections", 3, 5, 7)
        assert plan(*growth, "--classes", 4, 6) == [
            ("8x9", 4, [3, 5, 7]),
            ("8x9", 6, [3]),
            ("9x9", 4, [3]),
        ]


@pytest.mark.slow
def test_growth_in_batches(tmp_path):
    path = tmp_path / "figures.json"
    arguments = [
        *("inference", "--growth", "--threads", 1, "--backbone", "R18", "--images", 2),
        *("--sizes", "64x96", "--detections", 4, "--classes", 3, 20, "--rounds", 1),
        *("--outputs", "panoptic_seg", "--json", path),
    ]
    run = subprocess.run(
        [sys.executable, "tools/benchmark", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "arithmetic of direct convolutions" in run.stdout
    content = json.loads(path.read_text())
    assert content["same_answer"] is True
    assert content["environment"]["images"] == 2
    rows = content["comparisons"]
    kinds = ["semantic upsampling", "pasting and merging", "after the network", "whole image"]
    assert [(row["what"], row["classes"]) for row in rows] == [
        (what, classes) for classes in (3, 20) for what in kinds
    ]
    _, _, after, whole, _, _, more_after, more_whole = rows
    assert 0 < after["ours_mb"] < more_after["ours_mb"]
    assert 0 < after["detectron2_mb"] < more_after["detectron2_mb"]
    assert more_whole["multiply_adds"] > whole["multiply_adds"] > 1e6
    assert whole["floor_ms"] > 0
    for side in ("ours", "detectron2"):
        resident = whole[f"{side}_resident_mb"]
        assert resident is None or isinstance(resident, float)


def test_a_batch_agrees_as_its_worst_image():
    from benchmark.models import agreement

    def output(score, *labels):
        segments = [{"isthing": True, "category_id": 0, "instance_id": 0, "id": 1, "score": score}]
        return {"panoptic_seg": (torch.tensor([labels]), segments)}

    ours = [output(0.5, 1, 1, 1, 0), output(0.5, 1, 1, 1, 1)]
    detectron2 = [output(0.5, 1, 1, 1, 1), output(0.7, 1, 1, 1, 1)]
    found = agreement(ours, detectron2)
    assert found["labels_equal"] == 0.75
    assert found["score_difference"] == pytest.approx(0.2)
    assert found["segments_equal"] == 1


def test_missing_peers_take_a_line_each(monkeypatch, capsys):
    from benchmark.inference import time_peers
    from benchmark.models import Setting

    for name in ("torchvision.models.detection", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    args = argparse.Namespace(device=torch.device("cpu"), precision="fp32", rounds=1)
    assert time_peers(Setting((8, 8), (8, 8)), 3, args) == []
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "torchvision_mask_rcnn",
        "mask2former",
    ]
