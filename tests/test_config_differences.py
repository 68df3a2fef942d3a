"""What a config has otherwise than the defaults, and who says so."""

import argparse
import pickle
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from panoptic_fpn_ext import add_panoptic_fpn_config
from panoptic_fpn_ext.config_differences import differences, grouped_differences, origin_of
from panoptic_fpn_ext.engine import setup

from .conftest import CONFIG, REPOSITORY


def run_of(config_file: Path, *opts: str):
    return setup(
        argparse.Namespace(config_file=str(config_file), opts=list(opts), eval_only=False, resume=0)
    )


@pytest.fixture
def child(tmp_path) -> Path:
    """A config on top of two that are on top of each other, and of one that is beside them."""
    lines = {
        "first.yaml": [f"_BASE_: {REPOSITORY / CONFIG}", "SEED: 1", "SOLVER: {BASE_LR: 0.5}"],
        "other.yaml": ["TEST: {INTERVALS: True}", "VERSION: 2"],
        "child.yaml": [
            "_BASE_: [first.yaml, other.yaml]",
            "SEED: 1",  # as in its base
            "SOLVER: {BASE_LR: 0.25, MAX_ITER: 9, STEPS: [3]}",
        ],
    }
    for name, content in lines.items():
        (tmp_path / name).write_text("\n".join(content))
    return tmp_path / "child.yaml"


def test_each_key_is_said_by_one(shapes, child, tmp_path):
    output = str(tmp_path / "output")
    # The last is the default: it differs from the file alone.
    opts = ("OUTPUT_DIR", output, "SOLVER.MAX_ITER", "7", "MODEL.MASK_ON", "False")
    opts += ("MODEL.PANOPTIC_FPN.OUTPUTS", "['sem_seg']")
    cfg = run_of(child, *opts)
    given, own, rest = grouped_differences(pickle.loads(pickle.dumps(cfg.clone())))
    assert (given.title, given.before) == ("given on the command line", "In the file")
    assert given.rows == [
        ("OUTPUT_DIR", output, "output/quickstart"),
        ("SOLVER.MAX_ITER", "7", "9"),
        ("MODEL.MASK_ON", "False", "True"),
        ("MODEL.PANOPTIC_FPN.OUTPUTS", "['sem_seg']", "['sem_seg', 'instances', 'panoptic_seg']"),
    ]
    assert own.title == f"in {child}, beyond first.yaml, other.yaml"
    assert sorted(own.rows) == [
        ("SOLVER.BASE_LR", "0.25", "0.5"),
        ("SOLVER.STEPS", "(3,)", "(380, 460)"),
    ]
    rows = {key: (value, before) for key, value, before in rest.rows}
    assert rows["SEED"] == ("1", "-1") and rows["TEST.INTERVALS"] == ("True", "False")
    assert rows["MODEL.ROI_HEADS.NUM_CLASSES"] == ("5", "80")  # said by the dataset
    keys = [row[0] for group in (given, own, rest) for row in group.rows]
    assert len(keys) == len(set(keys))
    assert {row[0] for row in differences(cfg)} == set(keys) - {"MODEL.MASK_ON"}
    assert "origin" not in cfg.dump().lower()


def test_a_file_without_base_and_no_command_line(shapes):
    own, rest = grouped_differences(run_of(REPOSITORY / CONFIG))
    assert own.title == f"in {REPOSITORY / CONFIG}" and own.before == "Default"
    assert ("SOLVER.OPTIMIZER", "ADAMW", "SGD") in own.rows
    assert "SOLVER.OPTIMIZER" not in [row[0] for row in rest.rows]


def test_of_unknown_origin_there_is_one_list():
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    assert grouped_differences(cfg) == []
    cfg.SEED = 3
    (group,) = grouped_differences(cfg)
    assert group.title == "differs from the defaults" and group.rows == [("SEED", "3", "-1")]
    assert origin_of(cfg) is None
