"""The counts of tools/efficiency.py, against arithmetic done by hand and the paper's findings."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("efficiency", ROOT / "tools" / "efficiency.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/efficiency.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_tiny_network_by_hand(tool):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # to 8 x 4 x 6
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2),  # to 6 x 4 x 6
        nn.ConvTranspose2d(6, 5, 2, stride=2),  # to 5 x 8 x 12
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 7),
    )
    cost = tool.count(network, torch.zeros(2, 3, 8, 12))
    outputs = (8 * 4 * 6, 6 * 4 * 6, 5 * 8 * 12, 7)
    each = (3 * 9, 8 // 2 * 9, 6, 5)  # multiply-adds of an output
    assert cost.activations == 2 * sum(outputs)
    assert cost.multiply_adds == 2 * sum(n * m for n, m in zip(outputs, each, strict=True))
    assert {"aten::batch_norm", "aten::upsample_bilinear2d"} <= cost.not_counted


@pytest.mark.parametrize("name", ["fpn", "dilation_16", "dilation_8", "symmetric"])
def test_a_tile_stands_for_the_whole_image(tool, name):
    cfg = tool.backbone_config(name, 50)
    backbone = tool.without_weights(lambda: build_backbone(cfg))
    whole = tool.count(backbone, torch.zeros(1, 3, 64, 96))
    assert tool.backbone_cost(backbone, (64, 96)) == whole


def test_the_parts_of_panoptic_fpn_by_hand(tool):
    """The semantic head, RPN and ROI heads of the paper at 64 x 96 pixels."""
    parts = tool.panoptic_fpn_parts(50, (64, 96))
    p2, p3, p4, p5, p6 = (16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2)
    first, later = 256 * 128 * 9, 128 * 128 * 9
    assert parts["semantic head"].multiply_adds == (
        (p2 + p3 + p4 + p5) * first + (p3 + p4 + p3 + 0) * later + p2 * 128 * 54
    )
    assert parts["RPN"].multiply_adds == (p2 + p3 + p4 + p5 + p6) * 256 * (256 * 9 + 3 + 12)
    assert parts["box head"].multiply_adds == 1000 * 1024 * (256 * 49 + 1024 + 81 + 320)
    assert parts["mask head"].multiply_adds == 100 * 196 * 256 * (4 * 256 * 9 + 4 * 256 + 4 * 80)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("efficiency")
    files = folder / "out.json", folder / "out.png"
    done = run("--size", 1020, 2048, "--json", files[0], "--plot", files[1])
    assert done.returncode == 0, done.stderr
    assert "dilation-16" in done.stdout
    assert files[1].read_bytes().startswith(b"\x89PNG")
    return {**json.loads(files[0].read_text()), "printed": done.stdout}


def test_the_page_has_the_tables_that_are_printed(result):
    page = (ROOT / "docs" / "EFFICIENCY.md").read_text()
    rows = [line for line in result["printed"].splitlines() if line.startswith("|")]
    assert len(rows) > 15
    assert [row for row in rows if row not in page] == []


def test_the_page_has_the_ratios_of_resnet_50(tool):
    costs = tool.compare_backbones(50, (1024, 2048))
    names = "dilation_16", "symmetric", "dilation_8"
    ratios = [costs[n]["multiply_adds"] / costs["fpn"]["multiply_adds"] for n in names]
    page = " ".join((ROOT / "docs" / "EFFICIENCY.md").read_text().split())
    assert "{:.2f}, {:.2f} and {:.2f} in multiply-adds.".format(*ratios) in page


def test_holds_what_the_paper_found(result):
    assert (result["backbone"], result["size"]) == ("R101", [1024, 2048])
    for what in ("multiply_adds", "activations"):
        ratios = result["ratios"][what]
        assert 0.8 <= ratios["fpn/dilation_16"] <= 1.25
        assert 1.5 <= ratios["symmetric/fpn"] <= 2.5
        assert ratios["dilation_8/fpn"] >= 2.5
        assert 0.4 <= ratios["panoptic_fpn/two_networks"] <= 0.65


def test_two_networks_share_nothing(result):
    networks = result["networks"]
    saved = networks["two networks"]["multiply_adds"] - networks["Panoptic FPN"]["multiply_adds"]
    assert saved == networks["backbone and FPN"]["multiply_adds"]
    assert saved == result["backbones"]["fpn"]["multiply_adds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", 0, 64), "--size 0 64"),
        (("--json", "no/such/folder/out.json"), "no folder no/such/folder"),
    ],
)
def test_bad_arguments_are_one_line(tool, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["efficiency.py", *map(str, arguments)])
    with pytest.raises(ValueError, match=message):
        tool.main()
