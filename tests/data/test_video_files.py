"""Videos that are read and written, by what OpenCV itself finds in them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.video_files import WRITTEN, VideoReader, VideoWriter


def write_video(
    path: Path, frames: Sequence[np.ndarray], rate: float, *, codec: str = "mp4v"
) -> Path:
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, size)
    for frame in frames:
        writer.write(np.ascontiguousarray(frame))
    writer.release()
    return path


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    """All frames, and the rate."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = capture.read()
        if not there:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


@pytest.fixture
def frames() -> list[np.ndarray]:
    """20 of 48x32 pixels that can be told apart."""
    return [np.full((32, 48, 3), 12 * k, np.uint8) for k in range(20)]


@pytest.mark.parametrize("suffix", WRITTEN)
@pytest.mark.parametrize("rate", [10, 29.97])
def test_there_and_back(frames, tmp_path, suffix, rate) -> None:
    file = tmp_path / f"a{suffix}"
    with VideoWriter(file, rate=rate) as writer:
        for frame in frames:
            writer.write(frame)
    expected, found = frames_of(file)
    reader = VideoReader(file)
    read = list(reader)
    assert reader.rate == pytest.approx(found) == pytest.approx(rate, abs=0.01)
    assert reader.num_frames == len(read) == len(expected) == 20
    for k, frame in enumerate(read):
        assert np.array_equal(frame, expected[k])
        assert np.abs(frame.astype(int) - frames[k]).max() < 8


def test_odd_sizes_lose_a_pixel(tmp_path) -> None:
    with VideoWriter(tmp_path / "a.mp4", rate=5) as writer:
        writer.write(np.zeros((33, 49, 3), np.uint8))
    ((frame,), _) = frames_of(tmp_path / "a.mp4")
    assert frame.shape == (32, 48, 3)


def test_one_that_ends_early(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), np.uint8)
    file = write_video(tmp_path / "a.avi", noise, 10, codec="MJPG")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    read = []
    with pytest.raises(UserError, match="cut off") as raised:
        for frame in VideoReader(file):
            read.append(frame)
    assert 5 < len(read) < 15
    assert f"a.avi: damaged or cut off: {len(read)} of its 20 frames" in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"no video", "half"])
def test_what_is_no_video_is_named(frames, tmp_path, content) -> None:
    file = tmp_path / "a.mp4"
    if content == "half":
        content = write_video(file, frames, 10).read_bytes()
        content = content[: len(content) // 2]
    if content is not None:
        file.write_bytes(content)
    expected = "missing" if content is None else "damaged, or no video"
    with pytest.raises(UserError, match=rf"a\.mp4: .*{expected}"):
        VideoReader(file)


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(UserError, match="camera 97: cannot be opened: there is none"):
        VideoReader(97)


def test_what_cannot_be_written(tmp_path) -> None:
    with (
        pytest.raises(UserError, match="cannot write a video of 48x32 pixels there"),
        VideoWriter(tmp_path / "nowhere" / "a.mp4", rate=10) as writer,
    ):
        writer.write(np.zeros((32, 48, 3), np.uint8))


def test_one_that_is_not_whole_on_the_disk(frames, tmp_path) -> None:
    """As when the disk is full, which OpenCV does not say."""
    with (
        pytest.raises(UserError, match=r"a.mp4: could not be written whole"),
        VideoWriter(tmp_path / "a.mp4", rate=10) as writer,
    ):
        for frame in frames:
            writer.write(frame)
        (tmp_path / "a.mp4").unlink()


def test_the_error_within_is_the_one_that_is_raised(frames, tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "a.mp4", rate=10) as writer:
        writer.write(frames[0])
        (tmp_path / "a.mp4").unlink()
        raise ZeroDivisionError


class Capture:
    """In place of OpenCV's: frames of 10 a second, of which it promises more or fewer."""

    def __init__(self, frames: Sequence[np.ndarray], promised: float, rate: float = 10) -> None:
        self._frames = iter(frames)
        self._known = {cv2.CAP_PROP_FPS: rate, cv2.CAP_PROP_FRAME_COUNT: promised}
        self.get = self._known.get
        self.isOpened, self.release = lambda: True, lambda: None

    def read(self) -> tuple[bool, np.ndarray | None]:
        frame = next(self._frames, None)
        return frame is not None, frame


@pytest.fixture
def captured(monkeypatch, tmp_path):
    """From a capture to a reader of it."""

    def captured(capture: Capture, source: Path | int = tmp_path) -> VideoReader:
        monkeypatch.setattr(cv2, "VideoCapture", lambda _: capture)
        return VideoReader(source)

    return captured


@pytest.mark.parametrize("promised", [-1, 0, 3, 20, 25])
def test_half_a_second_may_be_missing(captured, frames, promised) -> None:
    reader = captured(Capture(frames, promised))
    assert len(list(reader)) == 20
    assert reader.num_frames == (promised if promised > 0 else None)


def test_more_may_not(captured, frames) -> None:
    with pytest.raises(UserError, match="20 of its 26 frames"):
        list(captured(Capture(frames, 26)))


def test_a_camera_promises_nothing(captured, frames) -> None:
    reader = captured(Capture(frames, 100, rate=0), 0)
    assert reader.num_frames is None and reader.rate == 25
    assert len(list(reader)) == 20


def test_a_frame_of_another_size_ends_it(captured, frames) -> None:
    read = []
    reader = captured(Capture([*frames[:3], np.zeros((16, 24, 3), np.uint8)], 4))
    with pytest.raises(UserError, match="ends early: frame 4 has 24x16, but the first 48x32"):
        for frame in reader:
            read.append(frame)
    assert len(read) == 3
