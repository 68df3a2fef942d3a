"""Videos, frame by frame by OpenCV; what is cut short is told, and so is what cannot be written."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import UserError

WRITTEN = (".mp4", ".m4v", ".mov", ".mkv", ".avi")
"""How the names of videos that :class:`VideoWriter` writes end."""

READ = (*WRITTEN, ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")

# H.264, which plays everywhere, is in few builds of OpenCV; MPEG-4 is in all of them.
_CODECS = ("avc1", "mp4v")
_USUAL_RATE = 25.0


class VideoReader:
    """The frames of a video or a camera, upright, to be taken once."""

    rate: float
    """Frames a second; 25 where it does not say."""
    num_frames: int | None
    """How many it says it has, if it does."""

    def __init__(self, source: str | os.PathLike | int) -> None:
        """
        Args:
            source: a file, or the number of a camera.

        Raises:
            UserError: it cannot be opened, or has no frame.
        """
        is_camera = isinstance(source, int)
        self._name = f"camera {source}" if is_camera else os.fspath(source)
        if not is_camera and not os.access(source, os.R_OK):
            raise UserError(f"{self._name}: cannot read the video: missing, or may not be read")
        _leave_the_talking_to_us()
        self._capture = cv2.VideoCapture(source if is_camera else self._name)
        if not self._capture.isOpened():
            expected = "there is none" if is_camera else "damaged, or no video that OpenCV knows"
            raise UserError(f"{self._name}: cannot be opened: {expected}")
        there, self._first = self._capture.read()
        if not there:
            raise UserError(f"{self._name}: no frame of it can be read")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _USUAL_RATE
        number = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = int(number) if number > 0 and not is_camera else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """
        Yields:
            (H, W, 3) uint8, BGR, all of one size.

        Raises:
            UserError: after the last frame, if half a second of them is missing; a frame of another
                size.
        """
        frame, shape, number = self._first, self._first.shape, 0
        try:
            there = True
            while there:
                if frame.shape != shape:
                    sizes = "{1}x{0}, but the first {3}x{2}".format(*frame.shape[:2], *shape[:2])
                    raise UserError(f"{self._name}: ends early: frame {number + 1} has {sizes}")
                number += 1
                yield frame
                there, frame = self._capture.read()
        finally:
            self._capture.release()
        # Some formats only estimate how many there are, and editors cut by hiding frames.
        if self.num_frames and self.num_frames - number > self.rate / 2:
            raise UserError(
                f"{self._name}: damaged or cut off: {number} of its {self.num_frames} frames can "
                "be read"
            )


class VideoWriter:
    """A context in which a video is written; at its end the file is complete.

    Widths and heights are even in these formats: an odd one loses its last pixel.

    Raises:
        UserError: at the end, if not all of it is there.
    """

    def __init__(self, file: str | os.PathLike, *, rate: float) -> None:
        """
        Args:
            file: its name ends as :data:`WRITTEN` has it, and says what is written.
            rate: frames a second.
        """
        self._file, self._rate = Path(file), rate
        self._writer: cv2.VideoWriter | None = None
        self.num_frames = 0

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self._writer is not None:
            self._writer.release()
        if error is None and self.num_frames:
            self._check()

    def write(self, frame: np.ndarray) -> None:
        """
        Args:
            frame: (H, W, 3) uint8, BGR, of the size of the first.

        Raises:
            UserError: the file cannot be written.
        """
        if self._writer is None:
            self._writer = self._opened(frame.shape[1::-1])
        self._writer.write(frame)
        self.num_frames += 1

    def _opened(self, size: tuple[int, int]) -> cv2.VideoWriter:
        _leave_the_talking_to_us()
        for codec in _CODECS:
            code = cv2.VideoWriter_fourcc(*codec)
            writer = cv2.VideoWriter(str(self._file), code, self._rate, size)
            if writer.isOpened():
                return writer
        raise UserError(
            f"{self._file.name}: OpenCV cannot write a video of {size[0]}x{size[1]} pixels there"
        )

    def _check(self) -> None:
        """OpenCV says nothing when a disk is full."""
        try:
            frames = VideoReader(self._file)
            complete = (frames.num_frames or 0) >= self.num_frames - self._rate / 2
        except UserError:
            complete = False
        if not complete:
            raise UserError(f"{self._file.name}: could not be written whole: is the disk full?")


def _leave_the_talking_to_us() -> None:
    """OpenCV and FFmpeg write to stderr themselves, unless they are told not to."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
