"""tools/draw_predictions.py: what its picture shows, and that each mistake is one line."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png

from ..conftest import CONFIG, REPOSITORY, SMALL
from ..data.tiny_dataset import TinyDataset
from ..test_small_datasets import config

SPEC = importlib.util.spec_from_file_location(
    "draw_predictions", REPOSITORY / "tools" / "draw_predictions.py"
)
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def options(trained: Path, tmp_path: Path) -> list[str]:
    """KEY VALUE of the network trained on the tiny Shapes."""
    weights = "MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path / "run"
    return [*SMALL, "MODEL.DEVICE", "cpu", *map(str, weights)]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyDataset]:
    """A dataset of other classes, which its config registers."""
    data = TinyDataset(tmp_path / "tiny")
    yield data
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "tiny" in catalog.list():
            catalog.remove("tiny")


def run(*arguments: str | Path) -> int:
    return tool.main([str(argument) for argument in arguments])


def is_white(pixels: np.ndarray) -> bool:
    return bool((pixels > 250).all())


class TestPicture:
    def test_shows_image_prediction_and_truth_of_each(self, options, tmp_path, shapes) -> None:
        file = tmp_path / "new" / "drawn.png"
        size = "--height", "64", "--columns", "2", "--num-images", "3"
        assert run("--config-file", CONFIG, "--output", file, *size, *options) == 0
        assert [path.name for path in file.parent.iterdir()] == ["drawn.png"]
        picture = cv2.imread(str(file))
        # The headings are wider than the pictures.
        columns = np.flatnonzero(~(picture[40:] > 250).all((0, 2)))
        left_of_each = [c for c in columns if c - 1 not in columns]
        assert len(left_of_each) == 6, "two images in a row, three pictures of each"
        top = next(y for y in range(len(picture)) if (picture[y : y + 64, columns[0]] < 250).all())
        image = cv2.imread(str(shapes / "val" / "000000000001.jpg"))
        shown = picture[top : top + 64, columns[0] : columns[0] + 64]
        assert np.abs(shown.astype(int) - image).max() <= 2, "the first is the image itself"
        assert not is_white(picture[:top, columns[0] : columns[0] + 64]), "its heading"
        lower = picture[top + 64 + tool.GAP :, left_of_each[3] :]
        assert is_white(lower), "the second row has one image"

    def test_chosen_images_and_options_anywhere(self, options, tmp_path, shapes, capsys) -> None:
        file = tmp_path / "drawn.jpg"
        chosen = "--image-ids", "5,2", "--height", "64", "--columns", "1", "--config-file", CONFIG
        assert run(*options, "--output", file, *chosen) == 0
        assert capsys.readouterr().out == f"2 images, drawn to {file}\n"
        picture = cv2.imread(str(file))
        rows = [
            picture[y : y + 64, x : x + 64]
            for y in (len(picture) - 2 * 64 - 2 * tool.GAP, len(picture) - 64 - tool.GAP)
            for x in [np.flatnonzero(~(picture[40:] > 240).all((0, 2)))[0]]
        ]
        for shown, number in zip(rows, (5, 2), strict=True):
            image = cv2.imread(str(shapes / "val" / f"{number:012d}.jpg"))
            assert np.abs(shown.astype(int) - image).mean() < 8

    def test_outputs_and_evaluators_of_the_config_do_not_matter(self, options, tmp_path) -> None:
        others = "MODEL.PANOPTIC_FPN.OUTPUTS", "['sem_seg']", "TEST.EVALUATORS", "detectron2"
        arguments = "--config-file", CONFIG, "--output", tmp_path / "drawn.png"
        assert run(*arguments, "--num-images", "1", *options, *others) == 0

    def test_images_without_annotations(self, options, tmp_path, shapes) -> None:
        file = tmp_path / "unlabelled.yaml"
        file.write_text(
            f"""
            _BASE_: {REPOSITORY / CONFIG}
            DATASETS:
              PANOPTIC:
                - name: unlabelled
                  image_root: {shapes / "val"}
                  panoptic_root: null
                  panoptic_json: {shapes / "annotations" / "panoptic_val.json"}
            """
        )
        picture = tmp_path / "drawn.png"
        arguments = "--config-file", file, "--dataset", "unlabelled", "--output", picture
        try:
            assert run(*arguments, "--height", "100", "--columns", "1", *options) == 0
        finally:
            DatasetCatalog.remove("unlabelled")
            MetadataCatalog.remove("unlabelled")
        assert cv2.imread(str(picture)).shape[1] == 2 * 100 + tool.GAP

    def test_a_match_has_the_colour_of_the_truth(self, tiny) -> None:
        """A perfect prediction looks as the truth does, whatever ids it has."""
        with tiny.registered() as name:
            (record, _), metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
            ids = read_panoptic_png(record["pan_seg_file_name"])
            segments = [s for s in record["segments_info"] if not s["iscrowd"]]
            record["segments_info"] = segments
            other = [{**s, "id": s["id"] + 1} for s in segments]
            _, prediction, truth = tool.pictures(record, [(ids + 1, other)], metadata, 240)
        assert np.array_equal(prediction, truth)


class TestMistakes:
    def one_line(self, capsys: pytest.CaptureFixture) -> str:
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("draw_predictions.py: error: ")
        assert not captured.out
        return line

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--num-images", "0"], "--num-images: expected 1 to 10000, got '0'"),
            (["--columns", "0"], "--columns: expected 1 to 100, got '0'"),
            (["--columns", "two"], "--columns: expected 1 to 100, got 'two'"),
            (["--height", "0"], "--height: expected 16 to 2000, got '0'"),
            (["--height", "-5"], "--height: expected 16 to 2000, got '-5'"),
            (["--image-ids", "2,7000"], "shapes_val has no image '7000'; ids are 1, 2, 3, ..."),
            (["--image-ids", ""], "shapes_val has no image ''"),
            (["--image-ids", "1", "--num-images", "1"], "not allowed with argument"),
            (["--output", "drawn.gif"], "--output drawn.gif: its name should end in .png or .jpg"),
            (["--output", "README.md/x.png"], "--output README.md: "),
            (
                ["--dataset", "shapes_vall"],
                "--dataset: no dataset 'shapes_vall' is registered; did",
            ),
            (["--dataset", "coco_2017_val_panoptic_fpn"], "--dataset: dataset 'coco_2017_val_pan"),
            (["--config-file", "nowhere.yaml"], "--config-file nowhere.yaml: no such file"),
            (["--wrong"], "unrecognized arguments: --wrong"),
            (["MODEL.WEIGHTS"], "options come as pairs KEY VALUE, got: "),
            (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS nowhere.pth: no such file"),
            (["MODEL.WEIGHTS", ""], "no weights to predict with: add MODEL.WEIGHTS FILE"),
            (["MODEL.WEIGHTS", "README.md"], "README.md: not a checkpoint"),
            (["MODEL.META_ARCHITECTURE", "SemanticFPN"], "does not give panoptic maps"),
            (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: name a dataset"),
        ],
    )
    def test_of_the_command_line(self, options, tmp_path, capsys, arguments, message) -> None:
        file = tmp_path / "drawn.png"
        assert run("--config-file", CONFIG, "--output", file, *options, *arguments) == 2
        line = self.one_line(capsys)
        assert message in line
        for absent in ("--eval-only", "--resume", "SUBMISSION"):
            assert absent not in line
        assert not list(tmp_path.glob("*drawn*"))

    def test_a_folder_in_place_of_the_file(self, options, tmp_path, capsys) -> None:
        (tmp_path / "drawn.png").mkdir()
        assert run("--config-file", CONFIG, "--output", tmp_path / "drawn.png", *options) == 2
        assert "drawn.png: is a folder" in self.one_line(capsys)

    def test_needed_options(self, capsys) -> None:
        assert run() == 2
        assert "required: --config-file, --output" in self.one_line(capsys)

    @pytest.mark.parametrize("beside", ["its config", "nothing"])
    def test_a_checkpoint_of_other_classes(self, options, tiny, tmp_path, capsys, beside) -> None:
        weights = options[options.index("MODEL.WEIGHTS") + 1]
        if beside == "nothing":
            weights = shutil.copy(weights, tmp_path / "moved.pth")
        arguments = "--config-file", config(tiny), "--output", tmp_path / "drawn.png"
        assert run(*arguments, "MODEL.WEIGHTS", weights) == 2
        line = self.one_line(capsys)
        expected = "is for 5 thing classes, but the model has 2"
        assert ("trained on other classes" if beside == "its config" else expected) in line

    def test_a_dataset_of_other_classes(self, options, tiny, tmp_path, capsys) -> None:
        with tiny.registered() as name:
            arguments = "--config-file", CONFIG, "--output", tmp_path / "drawn.png"
            assert run(*arguments, "--dataset", name, *options) == 2
        assert "datasets shapes_train and tiny have different thing" in self.one_line(capsys)

    @pytest.mark.parametrize("kind", ["images", "pngs"])
    def test_an_unreadable_file_leaves_the_old_picture(
        self, options, shapes, tmp_path, capsys, kind
    ) -> None:
        folder = {"images": "val", "pngs": "panoptic_val"}[kind]
        (path,) = (shapes / folder).glob("000000000003.*")
        content, picture = path.read_bytes(), tmp_path / "drawn.png"
        picture.write_text("old")
        path.write_bytes(content[:100])
        try:
            assert run("--config-file", CONFIG, "--output", picture, *options) == 2
        finally:
            path.write_bytes(content)
        assert str(path) in self.one_line(capsys)
        assert picture.read_text() == "old"
        assert not list(tmp_path.glob(".*"))


def test_ctrl_c(options, tmp_path) -> None:
    arguments = ["--config-file", CONFIG, "--output", str(tmp_path / "drawn.png"), *options]
    process = subprocess.Popen(
        [sys.executable, "tools/draw_predictions.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not list(tmp_path.glob(".*")):
        time.sleep(0.02)  # until it begins
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "draw_predictions.py: interrupted; nothing is written"
    assert not list(tmp_path.glob("*drawn*"))


def test_pictures_of_any_width_lie_in_columns() -> None:
    """Those of one column are centred under one heading, whatever their widths."""
    widths = {101: (30, 80, 30), 102: (200, 30, 30), 103: (150, 150, 150)}  # by shade of grey
    pictures = [[np.full((40, w, 3), grey, np.uint8) for w in row] for grey, row in widths.items()]
    page = np.asarray(tool.sheet(pictures, columns=2))[-2 * (40 + tool.GAP) :]  # without headings
    for grey, row in widths.items():
        assert (page == grey).all(2).sum() == sum(row) * 40, "each is there, whole"
    first, third = (np.flatnonzero((page == grey).all(2).any(0)) for grey in (101, 103))
    assert first[0] - third[0] == (150 - 30) // 2
    assert not (page[40 + tool.GAP :] == 101).all(2).any(), "in the first of two rows"
