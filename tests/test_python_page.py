"""docs/PYTHON.md, its blocks run one after the other as they stand there, trainings cut short."""

import logging
import re

import pytest
from detectron2.engine import DefaultTrainer

from .conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "PYTHON.md").read_text()
SHORT = {"cfg.SOLVER.MAX_ITER = 100": 2, "cfg.TEST.EVAL_PERIOD = 50": 1}
SMALL = """
cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.SOLVER.IMS_PER_BATCH = (64,), 64, 2
cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 16
cfg.MODEL.DEVICE = "cpu"
"""


@pytest.fixture
def blocks(shapes, tmp_path, monkeypatch, caplog) -> dict[str, str]:
    """The page's code by heading, in a folder that is like a clone after the quickstart."""
    caplog.set_level(logging.INFO, "detectron2")  # else the trainer sets up logging, for good
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "shapes").symlink_to(shapes)
    monkeypatch.chdir(tmp_path)
    sections = PAGE.split("\n## ")[1:]
    found = {s.partition("\n")[0]: re.findall(r"```python\n(.*?)```", s, re.S) for s in sections}
    assert PAGE.count("```") == 2 * len(found) == 2 * sum(map(len, found.values()))
    return {heading: code for heading, (code,) in found.items()}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_blocks_run(blocks, tmp_path, caplog, capsys):
    loop = blocks["Your own loop"]
    for line, value in SHORT.items():
        assert sum(line in code for code in blocks.values()) == 1
        short = f"{line.rpartition(' ')[0]} {value}"
        blocks = {heading: code.replace(line, short) for heading, code in blocks.items()}
    loop, trainer, evaluator, outputs = blocks.values()
    line = 'cfg.OUTPUT_DIR = "output/my_loop"\n'
    assert line in loop
    loop = loop.replace(line, line + SMALL)
    names = {}

    exec(loop, names)
    assert "shapes_val" in capsys.readouterr().out
    assert (tmp_path / "output/my_loop/coco_instances_results.json").exists()
    assert names["start"] == 0
    exec(loop, names)
    assert names["start"] == 2  # it goes on
    assert {"loss_sem_seg", "loss_mask", "loss_rpn_cls"} <= names["losses"].keys()

    caplog.clear()
    exec(trainer, names)
    assert caplog.text.count("Start inference") == 2
    assert (tmp_path / "output/my_trainer/last_checkpoint").read_text() == "model_final.pth"
    assert names["trainer"]._last_eval_results.keys() == {"panoptic_seg", "sem_seg", "bbox", "segm"}
    assert issubclass(names["Trainer"], DefaultTrainer)

    capsys.readouterr()
    exec(evaluator, names)
    assert float(capsys.readouterr().out) == 100

    exec(outputs, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names["segments_info"]) > 0
    found, instances = names["outputs"], names["outputs"]["instances"]
    assert found.keys() == {"sem_seg", "instances", "panoptic_seg"}
    assert {*instances.get_fields()} == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    assert names["panoptic_seg"].shape == found["sem_seg"].shape[1:] == (64, 64)
    for segment in names["segments_info"]:
        more = {"score", "instance_id"} if segment["isthing"] else {"area"}
        assert segment.keys() == {"id", "isthing", "category_id"} | more
    assert "left out" not in caplog.text


def test_the_readme_leads_to_it():
    assert "(docs/PYTHON.md)" in (REPOSITORY / "README.md").read_text()
