"""Submissions, read back by cityscapesscripts' program, which reads COCO's format."""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation.evalPanopticSemanticLabeling import evaluatePanoptic
from detectron2.data import MetadataCatalog

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.errors import UserError
from panoptic_fpn_ext.evaluation.panoptic_quality import PanopticQualityEvaluator
from panoptic_fpn_ext.evaluation.submission import PanopticSubmissionWriter

NAME = "panoptic_val_panoptic-fpn_results"


def extract(folder: Path) -> Path:
    """Unpack the only thing in a folder, the zip of ``shapes_val``; returns where to."""
    assert [path.name for path in folder.iterdir()] == ["shapes_val_submission.zip"]
    with zipfile.ZipFile(folder / "shapes_val_submission.zip") as file:
        file.extractall(folder / "extracted")
    return folder / "extracted"


def official_scores(folder: Path, tmp_path: Path) -> dict[str, float]:
    metadata = MetadataCatalog.get("shapes_val")
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluatePanoptic(
            metadata.panoptic_json,
            metadata.panoptic_root,
            str(folder / f"{NAME}.json"),
            str(folder / NAME),
            str(tmp_path / "results.json"),
        )
    return {
        f"{metric.upper()}{suffix}": 100 * results[split][metric]
        for suffix, split in (("", "All"), ("_th", "Things"), ("_st", "Stuff"))
        for metric in ("pq", "sq", "rq")
    }


def test_the_official_program_gives_the_same_scores(shapes_predictions, tmp_path):
    records, outputs = shapes_predictions
    writer = PanopticSubmissionWriter.from_dataset("shapes_val", tmp_path / "out")
    evaluator = PanopticQualityEvaluator.from_dataset("shapes_val")
    for _ in range(2):  # the second replaces the first
        writer.reset()
        writer.process(records, outputs)
        assert writer.evaluate() is None
    evaluator.process(records, outputs)
    expected = evaluator.evaluate()["panoptic_seg"]

    folder = extract(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [NAME, f"{NAME}.json"]
    scores = official_scores(folder, tmp_path)
    assert 0 < scores["PQ"] < 100
    assert scores == pytest.approx({key: expected[key] for key in scores}, rel=0, abs=1e-10)


def test_several_processes_and_repeats(shapes_predictions, tmp_path, evaluate_in_processes):
    records, outputs = shapes_predictions
    parts = [(records[3:], outputs[3:]), (records[:4], outputs[:4])]
    evaluate_in_processes(
        lambda: PanopticSubmissionWriter.from_dataset("shapes_val", tmp_path), parts
    )
    content = json.loads((extract(tmp_path) / f"{NAME}.json").read_text())
    ids = [annotation["image_id"] for annotation in content["annotations"]]
    assert ids == sorted(record["image_id"] for record in records)


def test_a_dataset_may_name_its_submission(shapes_predictions, tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("shapes_val")
    monkeypatch.setitem(metadata.__dict__, "submission_name", "shapes_panoptic_test")
    writer = PanopticSubmissionWriter.from_dataset("shapes_val", tmp_path)
    writer.process(*shapes_predictions)
    writer.evaluate()
    names = sorted(path.name for path in extract(tmp_path).iterdir())
    assert names == ["shapes_panoptic_test", "shapes_panoptic_test.json"]


def output_of(ids: list[list[int]], segments: list[dict]) -> dict:
    return {"panoptic_seg": (torch.tensor(ids, dtype=torch.int32), segments)}


def small_writer(folder: Path) -> PanopticSubmissionWriter:
    return PanopticSubmissionWriter(
        zip_file=folder / "shapes_val_submission.zip",
        name="cityscapes_panoptic_test",
        image_root="images",
        thing_category_ids=[24, 26],
        stuff_category_ids=[7, 24, 26, 8],
    )


def test_what_is_written(tmp_path):
    writer = small_writer(tmp_path)
    segments = [
        {"id": 1, "isthing": True, "category_id": 1, "score": 0.5},
        {"id": 300, "isthing": False, "category_id": 3, "area": 1},
    ]
    record = {"file_name": "berlin/berlin_1_2_leftImg8bit.png", "image_id": "berlin_1_2"}
    writer.process([record], [output_of([[-1, 0, 1, 300]], segments)])
    writer.evaluate()
    folder = extract(tmp_path)
    assert json.loads((folder / "cityscapes_panoptic_test.json").read_text()) == {
        "annotations": [
            {
                "image_id": "berlin_1_2",
                "file_name": "berlin_1_2_leftImg8bit.png",
                "segments_info": [{"id": 1, "category_id": 26}, {"id": 300, "category_id": 8}],
            }
        ]
    }
    png = folder / "cityscapes_panoptic_test" / "berlin_1_2_leftImg8bit.png"
    assert np.array_equal(read_panoptic_png(png), [[0, 0, 1, 300]])


def test_folders_and_ids_of_every_kind(tmp_path):
    """Images of one name in two folders; ids that are numbers and strings."""
    writer = small_writer(tmp_path)
    for image_id, name in ((2, "images/b/x.jpg"), ("1", "images/a/x.jpg"), (1, "elsewhere/y.jpg")):
        writer.process([{"file_name": name, "image_id": image_id}], [output_of([[0]], [])])
    writer.evaluate()
    folder = extract(tmp_path)
    written = json.loads((folder / "cityscapes_panoptic_test.json").read_text())["annotations"]
    names = {entry["image_id"]: entry["file_name"] for entry in written}
    assert names == {2: "b/x.png", "1": "a/x.png", 1: "y.png"}
    for name in names.values():
        assert (folder / "cityscapes_panoptic_test" / name).is_file()


def test_mistakes_are_named(tmp_path):
    writer = small_writer(tmp_path)
    for image_id in (1, 2):
        record = {"file_name": f"elsewhere/{image_id}/a.jpg", "image_id": image_id}
        writer.process([record], [output_of([[0]], [])])
    with pytest.raises(UserError, match="two images have one name"):
        writer.evaluate()
    writer.reset()
    writer.process([{"file_name": "a.jpg", "image_id": 1}], [output_of([[0]], [])])
    for png in tmp_path.rglob("*.png"):
        png.unlink()
    with pytest.raises(UserError, match="1 of 1 predictions are missing.* share"):
        writer.evaluate()
    assert not (tmp_path / "shapes_val_submission.zip").exists()
