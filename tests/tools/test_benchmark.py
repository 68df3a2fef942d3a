"""The benchmark, on images small enough for a test."""

import json
import subprocess
import sys

import pytest

from ..conftest import QUIET, REPOSITORY

SMALL = ["--threads", 1, "--backbone", "R18", "--sizes", "96x128", "--rounds", 1]


def benchmark(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/benchmark", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**QUIET, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def figures(run: subprocess.CompletedProcess, path) -> dict:
    """The JSON of a run, whose figures must be consistent with each other."""
    assert run.returncode == 0, run.stderr[-3000:]
    content = json.loads(path.read_text())
    assert content["environment"]["cores"] == 1
    assert content["same_answer"] is True
    for comparison in content["comparisons"]:
        assert comparison["same_answer"] is True
        ours, theirs = comparison["ours_ms"], comparison["detectron2_ms"]
        for times in (ours, theirs):
            assert 0 < times["lower"] <= times["median"] <= times["upper"]
        ratio = theirs["median"] / ours["median"]
        assert comparison["ratio"] == pytest.approx(ratio, abs=0.01)
        assert comparison["what"] in run.stdout
    return content


def test_evaluation_compares_and_checks(tmp_path):
    path = tmp_path / "figures.json"
    run = benchmark(
        *("evaluation", "--sizes", "96x128", "--images", 2, "--rounds", 2, "--json", path)
    )
    comparisons = figures(run, path)["comparisons"]
    assert [c["what"] for c in comparisons] == ["PQ", "mIoU", "box and mask AP", "PQ + mIoU + AP"]
    assert {c["size"] for c in comparisons} == {"96x128"}


def test_eval_only_gives_the_scores_of_detectron2(trained, tmp_path):
    path = tmp_path / "figures.json"
    weights = trained / "model_final.pth"
    config = ["--config-file", trained / "config.yaml"]
    run = benchmark(
        *("eval-only", *config, "--threads", 1, "--rounds", 1, "--json", path),
        *("--opts", "MODEL.WEIGHTS", weights),
    )
    (row,) = figures(run, path)["comparisons"]
    assert (row["what"], row["size"]) == ("eval-only", "shapes_val, 6 images")
    compared = {"panoptic_seg/PQ", "panoptic_seg/PQ_th", "sem_seg/mIoU", "bbox/AP", "segm/AP"}
    assert {f"{score}_difference" for score in compared} <= row["agreement"].keys()

    run = benchmark("eval-only", *config)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "--eval-only needs weights" in run.stderr


@pytest.mark.slow
def test_inference_compares_and_checks(tmp_path):
    path = tmp_path / "figures.json"
    run = benchmark("inference", *SMALL, "--detections", 6, "--peers", "--json", path)
    content = figures(run, path)
    network = ["preprocess", "backbone", "semantic head", "RPN", "ROI heads"]
    parts = ["semantic upsampling", "pasting and merging"]
    rows = [(c["what"], c["outputs"]) for c in content["comparisons"]]
    assert rows == [(stage, None) for stage in network] + [
        (what, outputs)
        for outputs in ("panoptic_seg", "all")
        for what in (*parts, "after the network", "whole image")
    ]
    assert {c["detections"] for c in content["comparisons"]} == {6}
    *stages, upsampling, merging, after, whole = (
        c for c in content["comparisons"] if c["outputs"] != "all"
    )
    stages.append(after)
    for side in ("ours_ms", "detectron2_ms"):
        total = upsampling[side]["median"] + merging[side]["median"]
        assert 0.5 * after[side]["median"] < total < 1.01 * after[side]["median"]
        total = sum(stage[side]["median"] for stage in stages)
        assert total == pytest.approx(whole[side]["median"], rel=0.1)
    alone, everything = (c for c in content["comparisons"] if c["what"] == "after the network")
    assert 0 < alone["ours_mb"] < everything["ours_mb"] <= everything["detectron2_mb"]
    assert alone["agreement"]["labels_equal"] >= 0.9999
    assert alone["agreement"]["segments_equal"] == 1
    assert set(everything["agreement"]) > {"sem_seg_difference", "instance_masks_equal"}
    assert "torchvision Mask R-CNN" in content["peers"][0]["what"]


@pytest.mark.slow
def test_training_compares_and_checks(tmp_path):
    path = tmp_path / "figures.json"
    run = benchmark("training", *SMALL, "--data-images", 2, "--json", path)
    comparisons = figures(run, path)["comparisons"]
    targets = [c for c in comparisons if c["what"].startswith("targets")]
    summed, concat, *_, step, data = (c for c in comparisons if c not in targets)
    assert summed["what"] == "semantic head's step, sum, 1 image(s)"
    assert concat["what"] == (
        "semantic head's step, concat, 1.04 x the multiply-adds, against sum, 1 image(s)"
    )
    for head in (summed, concat):
        assert head["ours_mb"] > 0
        differences = [v for k, v in head["agreement"].items() if k.endswith("difference")]
        assert len(differences) == 3
        assert max(differences) <= 1e-3
    # Of one pixel at stride 4: the first convolution of each level, then the others, at 1/8 (of
    # two levels) and 1/16.
    layers = 9 * 128 * (256 * (1 + 1 / 4 + 1 / 16 + 1 / 64) + 128 * (1 / 4 + 1 / 4 + 1 / 16))
    more = (layers + 4 * 128 * 54) / (layers + 128 * 54)
    assert concat["agreement"]["multiply-adds over sum"] == pytest.approx(more)
    assert step["what"] == "training step, 1 image(s)"
    assert step["ours_mb"] > 0
    assert max(step["agreement"].values()) <= 1e-3
    assert data["what"] == "data, one worker"
    assert len(targets) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation", "--sizes", "480"], "'480' is not HEIGHTxWIDTH"),
        (["evaluation", "--rounds", "0"], "'0' is not a positive integer"),
        (["inference", "--sizes", "large"], "coco or cityscapes"),
        (["training", "--device", "tpu"], "'tpu' is neither cpu nor cuda"),
    ],
)
def test_mistakes_get_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    from benchmark.__main__ import parser

    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
