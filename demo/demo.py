#!/usr/bin/env python
r"""Draw what a network predicts for images, folders of images, videos, or a camera.

    python demo/demo.py --config-file configs/quickstart.yaml \
        --input FOLDER 'more/*.jpg' street.mp4 --output OUT \
        --opts MODEL.WEIGHTS output/quickstart/model_final.pth

Of a folder its images and videos are taken, not those of folders in it. What is drawn has the name
of its input. Without --output it is shown in a window: Esc ends, any other key goes on.

Exit status: 0 all is drawn; 1 some inputs cannot be read, and are named; 2 there is a mistake.
"""

import argparse
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from panoptic_fpn_ext import Predictor, UserError  # isort: skip  (before PyTorch and Detectron2)

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from PIL import Image
from tqdm import tqdm

from panoptic_fpn_ext.command_line import Parser, whole_file
from panoptic_fpn_ext.config import MERGING_ARCHITECTURES
from panoptic_fpn_ext.data.image_files import SUFFIXES as IMAGES
from panoptic_fpn_ext.data.image_files import read_image
from panoptic_fpn_ext.data.video_files import READ, WRITTEN, VideoReader, VideoWriter
from panoptic_fpn_ext.engine import setup_trained
from panoptic_fpn_ext.overlap import overlapped
from panoptic_fpn_ext.visualization import Color, SteadyColors, draw_panoptic, drawn_segments

THRESHOLDS = (
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
)
ESCAPE = 27


class Job(NamedTuple):
    """An input, and the file that is written of it, if any."""

    source: Path
    target: Path | None

    @property
    def is_video(self) -> bool:
        return _ends(self.source, READ)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        return run(parse(arguments))
    except UserError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndemo.py: interrupted; files that are there are whole", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="images, videos, folders, or patterns of names"
    )
    source.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="N", help="camera N, by default 0"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="a folder; of one input, a file too"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=_share,
        metavar="SCORE",
        help="draw things whose score is above it, 0 to 1 (default: the config's thresholds)",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys, as the last option; MODEL.WEIGHTS FILE is the checkpoint",
    )
    args = parser.parse_args(arguments)
    if args.webcam is not None and args.output:
        raise UserError("--output: what a camera sees is only shown; leave it out")
    return args


def _share(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text!r}")


def run(args: argparse.Namespace) -> int:
    """Draw everything; the exit status."""
    jobs = [] if args.input is None else planned(args.input, args.output)
    cfg = config(args.config_file, args.opts, args.confidence_threshold)
    if args.output:
        make_folder(jobs[0].target.parent)
    window = None if args.output else Window()
    demo = Demo(cfg, window)
    try:
        if args.webcam is not None:
            demo.draw_frames(VideoReader(args.webcam), f"camera {args.webcam}")
        demo.draw_images([job for job in jobs if not job.is_video])
        for job in jobs:
            if job.is_video:
                demo.draw_video(job)
    except WindowClosed:
        pass
    if args.output:
        print(f"{demo.drawn} of {len(jobs)} inputs drawn to {args.output}")
    return 1 if demo.faulty else 0


# What is drawn, and where


def planned(patterns: Sequence[str], output: Path | None) -> list[Job]:
    """The inputs, each with its own file.

    Raises:
        UserError: nothing is there; two inputs have one name; a file would be written over an
            input.
    """
    sources = list(dict.fromkeys(path for pattern in patterns for path in found(pattern)))
    if output is None:
        return [Job(source, None) for source in sources]
    if _ends(output, IMAGES + READ) and not output.is_dir():
        return [Job(sources[0], _single(sources, output))]
    jobs: dict[str, Job] = {}
    inputs = {identity(source) for source in sources}
    for source in sources:
        written, default = (WRITTEN, ".mp4") if _ends(source, READ) else (IMAGES, ".png")
        name = source.name if _ends(source, written) else f"{source.stem}{default}"
        job = Job(source, output / name)
        if name in jobs:
            raise UserError(
                f"{jobs[name].source} and {source}: both would be drawn to {job.target}; draw them "
                "one after the other, to two folders"
            )
        jobs[name] = job
        if job.target.exists() and identity(job.target) in inputs:
            raise UserError(f"--output {output}: {job.target} is an input; name another folder")
    return list(jobs.values())


def _single(sources: Sequence[Path], output: Path) -> Path:
    """The file for one input, which has to be of its kind."""
    if len(sources) > 1:
        raise UserError(f"--output {output}: one file, for {len(sources)} inputs; name a folder")
    (source,) = sources
    kind, written = ("a video", WRITTEN) if _ends(source, READ) else ("an image", IMAGES)
    if not _ends(output, written):
        raise UserError(
            f"--output {output}: {source} is {kind}; the name should end in {', '.join(written)}"
        )
    if output.exists() and identity(output) == identity(source):
        raise UserError(f"--output {output}: is the input; name another file")
    return output


def found(pattern: str) -> list[Path]:
    """The files that an argument stands for, in the order of their names.

    Raises:
        UserError: there is none.
    """
    path = Path(pattern)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".")
        files = [p for p in files if _ends(p, IMAGES + READ)]
        if not files:
            raise UserError(f"--input {pattern}: there is no image or video in the folder")
        return files
    if path.exists():
        return [path]
    files = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
    files = [p for p in files if p.is_file()]
    if not files:
        raise UserError(f"--input {pattern}: no such file")
    return files


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.suffix.lower() in suffixes


def identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def make_folder(folder: Path) -> None:
    """
    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "may not be written to")
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from error


def config(config_file: str, opts: Sequence[str], threshold: float | None) -> CfgNode:
    """The config of the network, which computes no more than is drawn.

    Raises:
        UserError: see :func:`setup_trained`; a threshold that has no effect.
    """
    options = list(opts)
    if threshold is not None:
        options += [option for key in THRESHOLDS for option in (key, str(float(threshold)))]
    cfg = setup_trained(config_file, options)
    cfg.defrost()
    architecture, outputs = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PANOPTIC_FPN.OUTPUTS
    if threshold is not None and not {"instances", "panoptic_seg"} & {*outputs}:
        raise UserError("--confidence-threshold has no effect: the network gives no instances")
    if architecture in MERGING_ARCHITECTURES and "panoptic_seg" in outputs:
        cfg.MODEL.PANOPTIC_FPN.OUTPUTS = ["panoptic_seg"]
    cfg.freeze()
    return cfg


# From pictures to drawings


class Demo:
    """Draws images and videos, and counts them; those that cannot be read are told, and skipped."""

    def __init__(self, cfg: CfgNode, window: "Window | None") -> None:
        """
        Args:
            cfg: see :func:`config`.
            window: where drawings without a file are shown.
        """
        self._predictor = Predictor(cfg, batch_size=1)
        self._metadata = known_metadata(self._predictor.metadata)
        self._window = window
        self.drawn = 0
        self.faulty = False  # whether some input could not be read, or not to its end

    def draw_images(self, jobs: Sequence[Job]) -> None:
        with self._progress(len(jobs), "image") as progress:

            def read() -> Iterator[tuple[Job, np.ndarray]]:
                for job in jobs:
                    try:
                        yield job, read_image({"file_name": str(job.source)}, "BGR")
                    except UserError as error:
                        self._tell(f"skipped: {error}")
                        progress.update()

            def predict(item: tuple[Job, np.ndarray]) -> dict[str, Any]:
                return self._predict(item[1])

            def finish(item: tuple[Job, np.ndarray], output: dict[str, Any]) -> np.ndarray:
                job, image = item
                drawing = self._drawing(image, *drawn_segments(output))
                if job.target:
                    save(drawing, job.target)
                return drawing

            with closing(overlapped(read(), predict, finish)) as drawings:
                for drawing in drawings:
                    self.drawn += 1
                    progress.update()
                    self._show(drawing, milliseconds=0)

    def draw_video(self, job: Job) -> None:
        """Draw all of a video that can be read."""
        try:
            reader = VideoReader(job.source)
        except UserError as error:
            self._tell(f"skipped: {error}")
            return
        if job.target:
            with (
                whole_file(job.target) as unfinished,
                VideoWriter(unfinished, rate=reader.rate) as writer,
            ):
                self.draw_frames(reader, job.source.name, writer)
        else:
            self.draw_frames(reader, job.source.name)
        self.drawn += 1

    def draw_frames(
        self, reader: VideoReader, name: str, writer: VideoWriter | None = None
    ) -> None:
        """
        Args:
            reader: of the frames.
            name: what the progress is called.
            writer: where drawings are written, if they are.
        """
        colors = SteadyColors(self._metadata)

        def read() -> Iterator[np.ndarray]:
            try:
                yield from reader
            except UserError as error:
                self._tell(f"warning: {error}")

        def finish(frame: np.ndarray, output: dict[str, Any]) -> np.ndarray:
            ids, segments = drawn_segments(output)
            drawing = self._drawing(frame, ids, segments, colors(ids, segments))
            if writer:
                writer.write(cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))
            return drawing

        with (
            self._progress(reader.num_frames, "frame", name) as progress,
            closing(overlapped(read(), self._predict, finish)) as drawings,
        ):
            for drawing in drawings:
                progress.update()
                self._show(drawing, milliseconds=1)

    def _predict(self, image: np.ndarray) -> dict[str, Any]:
        (output,) = self._predictor([image])
        return output

    def _drawing(
        self,
        image: np.ndarray,
        ids: np.ndarray,
        segments: list[dict[str, Any]],
        colors: dict[int, Color] | None = None,
    ) -> np.ndarray:
        """(H, W, 3) uint8, RGB, of an image (H, W, 3) uint8, BGR."""
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return draw_panoptic(image, ids, segments, self._metadata, colors=colors)

    def _show(self, drawing: np.ndarray, *, milliseconds: int) -> None:
        if self._window:
            self._window.show(drawing, milliseconds=milliseconds)

    def _tell(self, message: str) -> None:
        self.faulty = True
        tqdm.write(f"demo.py: {message}", file=sys.stderr)

    def _progress(self, number: int | None, unit: str, name: str | None = None) -> tqdm:
        quiet = None if number is None or number else True  # None: where there is no terminal
        return tqdm(total=number, unit=unit, desc=name, dynamic_ncols=True, disable=quiet)


def known_metadata(metadata: Metadata | None) -> Metadata:
    """Metadata to draw with; without names where the dataset that has them is not here."""
    try:
        if metadata is not None:
            metadata.get("stuff_classes", None)
            return metadata
    except UserError:
        pass
    return Metadata(name="unknown")


def save(drawing: np.ndarray, path: Path) -> None:
    """
    Raises:
        UserError: it cannot be written.
    """
    with whole_file(path) as unfinished:
        try:
            Image.fromarray(drawing).save(unfinished, quality=90)
        except (OSError, ValueError) as error:  # the disk is full, or a format has its limits
            raise UserError(f"--output {path}: cannot be written: {error}") from error


class WindowClosed(Exception):
    """No more is to be shown."""


class Window:
    """One on the screen."""

    _NAME = "panoptic_fpn_ext"

    def __init__(self) -> None:
        """
        Raises:
            UserError: there is no screen, or OpenCV has no windows.
        """
        try:
            if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
                raise cv2.error  # which OpenCV would end the process for
            cv2.namedWindow(self._NAME, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise UserError(
                "there is no window to show drawings in (no screen, or a headless OpenCV): "
                "--output is needed, and for --webcam a screen and the package opencv-python"
            ) from error

    def show(self, drawing: np.ndarray, *, milliseconds: int) -> None:
        """
        Args:
            drawing: (H, W, 3) uint8, RGB.
            milliseconds: to wait for a key; 0 for ever.

        Raises:
            WindowClosed: Esc was pressed.
        """
        cv2.imshow(self._NAME, cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))
        if cv2.waitKey(milliseconds) == ESCAPE:
            raise WindowClosed


if __name__ == "__main__":
    sys.exit(main())
