"""demo/demo.py: what it draws and where, what it tells, and that nothing is left half-written."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from PIL import Image

from panoptic_fpn_ext import Predictor
from panoptic_fpn_ext.visualization import draw_panoptic

from .conftest import CONFIG, MENDED, QUIET, REPOSITORY, SMALL
from .data.test_video_files import frames_of, write_video

SPEC = importlib.util.spec_from_file_location("demo", REPOSITORY / "demo" / "demo.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def opts(trained: Path) -> list[str]:
    """KEY VALUE of the network trained on the tiny Shapes."""
    return [*SMALL, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(trained / "model_final.pth")]


@pytest.fixture
def images(shapes: Path) -> list[Path]:
    return sorted((shapes / "val").glob("*.jpg"))


@pytest.fixture
def video(images: list[Path], tmp_path: Path) -> Path:
    """Of 24 frames, 12 a second."""
    pictures = [cv2.imread(str(path)) for path in images[:2]]
    wide = cv2.resize(np.concatenate(pictures, 1), (192, 64))
    return write_video(tmp_path / "clip.mp4", [wide[:, 4 * k : 4 * k + 96] for k in range(24)], 12)


def run(*arguments: str | Path) -> int:
    return tool.main(["--config-file", CONFIG, *map(str, arguments)])


def told(said: str) -> list[str]:
    """The lines of the program; those of another Detectron2 than the mended one warn, too."""
    return said.splitlines() if MENDED else [k for k in said.splitlines() if "demo.py: " in k]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestImages:
    def test_files_folders_and_patterns(self, opts, images, tmp_path, capsys) -> None:
        """One that cannot be read is named and skipped."""
        folder, output = tmp_path / "folder", tmp_path / "new" / "out"
        folder.mkdir()
        for k, name in enumerate(("a.png", "b.JPG", ".hidden.png")):
            Image.open(images[k]).save(folder / name)
        (folder / "notes.txt").write_text("none")
        (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
        (folder / "within").mkdir()
        Image.open(images[3]).save(folder / "within" / "c.png")
        inputs = folder, folder / "w*" / "*.png", images[4], folder / "a.png"
        assert run("--input", *inputs, "--output", output, "--opts", *opts) == 1
        captured = capsys.readouterr()
        assert names(output) == [images[4].name, "a.png", "b.JPG", "c.png"]
        assert captured.out == f"4 of 5 inputs drawn to {output}\n"
        (line,) = told(captured.err)
        assert line.startswith(f"demo.py: skipped: {folder / 'broken.png'}: cannot read the image")

        cfg = tool.config(CONFIG, opts, None)
        image = cv2.imread(str(folder / "a.png"))
        expected = draw_panoptic(
            image[:, :, ::-1],
            *DefaultPredictor(cfg)(image)["panoptic_seg"],
            MetadataCatalog.get("shapes_val"),
        )
        drawn = np.asarray(Image.open(output / "a.png"))
        assert (drawn == expected).mean() > 0.99
        assert (drawn != image[:, :, ::-1]).any(2).mean() > 0.5

    def test_the_orientation_of_a_photograph(self, opts, images, tmp_path) -> None:
        upright = Image.open(images[0]).crop((0, 0, 64, 40))
        upright.save(tmp_path / "upright.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned right
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        assert run("--input", tmp_path, "--output", tmp_path / "out", "--opts", *opts) == 0
        first, second = (Image.open(tmp_path / "out" / f"{n}.png") for n in ("upright", "turned"))
        assert first.size == second.size == (64, 40)
        assert np.array_equal(first, second)
        assert not second.getexif()

    @pytest.mark.parametrize(
        "model",
        [
            ["MODEL.META_ARCHITECTURE", "SemanticFPN"],
            ["MODEL.PANOPTIC_FPN.OUTPUTS", "['instances']"],
            ["MODEL.META_ARCHITECTURE", "PanopticFPN"],
        ],
    )
    def test_a_named_file_by_other_networks(self, opts, images, tmp_path, model) -> None:
        file = tmp_path / "drawn.jpeg"
        file.write_text("old")
        assert run("--input", images[0], "--output", file, "--opts", *opts, *model) == 0
        assert Image.open(file).size == (64, 64)
        assert names(tmp_path) == ["drawn.jpeg"]

    @pytest.mark.parametrize("suffix", tool.IMAGES)
    def test_every_format_can_be_written(self, tmp_path, suffix) -> None:
        drawing = np.full((8, 9, 3), 200, np.uint8)
        tool.save(drawing, tmp_path / f"a{suffix}")
        assert (
            np.abs(np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB")) - 200).max() < 9
        )

    def test_a_threshold(self, opts, images) -> None:
        def things(threshold: float) -> list[float]:
            predictor = Predictor(tool.config(CONFIG, opts, threshold))
            (_, segments), *_ = [r["panoptic_seg"] for r in predictor([str(images[0])])]
            return [s["score"] for s in segments if s["isthing"]]

        some = things(0)
        assert some and not things(1)
        assert things(max(some) - 1e-4) == pytest.approx([max(some)], abs=1e-4)


class TestVideos:
    def test_keeps_rate_length_and_size(self, opts, video, tmp_path) -> None:
        output = tmp_path / "out"
        assert run("--input", video, "--output", output, "--opts", *opts) == 0
        assert names(output) == ["clip.mp4"]
        drawn, rate = frames_of(output / "clip.mp4")
        given, _ = frames_of(video)
        assert len(drawn) == 24 and rate == 12
        assert {frame.shape for frame in drawn} == {(64, 96, 3)}
        apart = [np.abs(a.astype(int) - b).mean() for a, b in zip(drawn, given, strict=True)]
        assert min(apart) > 5, "each is drawn on"

    def test_what_is_damaged_is_told(self, opts, video, tmp_path, capsys) -> None:
        folder, output = tmp_path / "in", tmp_path / "out"
        folder.mkdir()
        frames, _ = frames_of(video)
        whole = write_video(folder / "cut.avi", frames, 12, codec="MJPG").read_bytes()
        (folder / "cut.avi").write_bytes(whole[: len(whole) // 2])
        (folder / "broken.mp4").write_bytes(video.read_bytes()[:400])
        (folder / "rest.webm").write_text("none")
        output.mkdir()
        (output / "broken.mp4").write_text("old")
        assert run("--input", folder, "--output", output, "--opts", *opts) == 1
        captured = capsys.readouterr()
        drawn, _ = frames_of(output / "cut.avi")
        assert 8 < len(drawn) < 18
        broken, cut, rest = told(captured.err)
        assert broken.startswith(f"demo.py: skipped: {folder / 'broken.mp4'}: ")
        assert f"{folder / 'cut.avi'}: damaged or cut off: {len(drawn)} of its 24 frames" in cut
        assert rest.startswith(f"demo.py: skipped: {folder / 'rest.webm'}: ")
        assert captured.out == f"1 of 3 inputs drawn to {output}\n"
        assert names(output) == ["broken.mp4", "cut.avi"]
        assert (output / "broken.mp4").read_text() == "old"


class TestEnds:
    @pytest.mark.parametrize(
        ("where", "error"), [("_predict", KeyboardInterrupt), ("_drawing", MemoryError)]
    )
    def test_nothing_is_left_half_written(
        self, opts, video, tmp_path, monkeypatch, where, error
    ) -> None:
        """Whatever ends it, in the network or in the thread that draws."""
        work, number = getattr(tool.Demo, where), []

        def fails(*arguments):
            number.append(1)
            if len(number) == 9:
                raise error
            return work(*arguments)

        monkeypatch.setattr(tool.Demo, where, fails)
        output = tmp_path / "out"
        output.mkdir()
        (output / "clip.mp4").write_text("old")
        arguments = "--input", video, "--output", output, "--opts", *opts
        if error is KeyboardInterrupt:
            assert run(*arguments) == 130
        else:
            with pytest.raises(error):
                run(*arguments)
        assert names(output) == ["clip.mp4"]
        assert (output / "clip.mp4").read_text() == "old"

    def test_ctrl_c(self, opts, video, tmp_path) -> None:
        """OpenCV and FFmpeg have nothing to say of their own, even on a broken video."""
        frames, _ = frames_of(video)
        write_video(video, frames * 100, 12)
        broken = tmp_path / "broken.mp4"
        broken.write_text("none")
        output = tmp_path / "out"
        arguments = "--input", broken, video, "--output", output, "--opts", *opts
        process = subprocess.Popen(
            [sys.executable, "demo/demo.py", "--config-file", CONFIG, *map(str, arguments)],
            env={**QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while process.poll() is None and not list(output.glob(".*")):
            time.sleep(0.02)  # until it begins
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        skipped, interrupted = filter(None, said.splitlines())
        assert skipped.startswith(f"demo.py: skipped: {broken}: ")
        assert interrupted == "demo.py: interrupted; files that are there are whole"
        assert not names(output)


class TestWindow:
    @pytest.fixture
    def shown(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        """Shapes of what is shown; Esc is pressed at the fourth."""
        shown: list[tuple[int, ...]] = []
        monkeypatch.setenv("DISPLAY", ":0")
        monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
        monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture.shape))
        monkeypatch.setattr(cv2, "waitKey", lambda _: 27 if len(shown) == 4 else -1)
        return shown

    def test_shows_what_has_no_output(self, opts, images, video, shown) -> None:
        assert run("--input", *images[:2], video, "--opts", *opts) == 0
        assert shown == 2 * [(64, 64, 3)] + 2 * [(64, 96, 3)]

    def test_shows_a_camera(self, opts, video, shown, monkeypatch) -> None:
        cameras = {2: tool.VideoReader(video)}
        monkeypatch.setattr(tool, "VideoReader", cameras.pop)
        assert run("--webcam", "2", "--opts", *opts) == 0
        assert shown == 4 * [(64, 96, 3)] and not cameras

    def test_where_there_is_none(self, opts, images, monkeypatch, capsys) -> None:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        assert run("--input", images[0], "--opts", *opts) == 2
        assert "--output is needed" in capsys.readouterr().err


class TestMistakes:
    @pytest.fixture(autouse=True)
    def _nothing_runs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tool, "Demo", None)
        for name in ("a/x.png", "b/x.png", "a/y.jpg", "a/v.mp4", "c/v.webm", "c/v.mp4"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "a")
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--input a/x.png b/x.png --output out", "a/x.png and b/x.png: both would be drawn to"),
            ("--input c --output out", "c/v.mp4 and c/v.webm: both would be drawn to out/v.mp4"),
            ("--input a --output a", "--output a: a/v.mp4 is an input"),
            ("--input a/*.png --output link", "--output link: link/x.png is an input"),
            ("--input a/x.png --output link/x.png", "--output link/x.png: is the input"),
            ("--input a --output x.png", "--output x.png: one file, for 3 inputs"),
            ("--input a/v.mp4 --output x.png", "a/v.mp4 is a video; the name should end in .mp4"),
            ("--input a/x.png --output x.mp4", "a/x.png is an image; the name should end in .jpg"),
            ("--input a/x.png --output a/y.jpg/z", "--output a/y.jpg/z: Not a directory"),
            ("--input nowhere.jpg --output out", "--input nowhere.jpg: no such file"),
            ("--input a/*.gif --output out", "--input a/*.gif: no such file"),
            ("--input empty --output out", "--input empty: there is no image or video"),
            ("--webcam --output out", "--output: what a camera sees is only shown"),
            ("--input a --webcam", "--webcam: not allowed with argument --input"),
            ("--output out", "one of the arguments --input --webcam is required"),
            ("--input a --output out --confidence-threshold 2", "expected 0 to 1, got '2'"),
            (
                "--input a --output out --confidence-threshold 0.5 "
                "--opts MODEL.META_ARCHITECTURE SemanticFPN",
                "--confidence-threshold has no effect",
            ),
            ("--input a --output out --opts MODEL.WEIGHTS no.pth", "MODEL.WEIGHTS no.pth: no such"),
        ],
    )
    def test_are_one_line_before_anything_runs(self, opts, capsys, arguments, message) -> None:
        first, _, more = arguments.partition("--opts")
        options = "--opts", *opts, *more.split()
        files = sorted(Path().rglob("*"))
        assert tool.main(["--config-file", str(REPOSITORY / CONFIG), *first.split(), *options]) == 2
        captured = capsys.readouterr()
        (line,) = told(captured.err)
        assert line.startswith("demo.py: error: ") and message in line
        assert sorted(Path().rglob("*")) == files
