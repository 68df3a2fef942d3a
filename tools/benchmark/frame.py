"""Measuring by turns: times, memory, how much two answers agree, and the report of it all."""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import detectron2
import numpy as np
import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")
MB = 2**20


@dataclass
class Times:
    """Milliseconds an image: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, seconds: Sequence[float], num_images: int = 1) -> "Times":
        milliseconds = [1000 * s / num_images for s in seconds]
        lower, upper = np.quantile(milliseconds, (0.25, 0.75)).tolist()
        return cls(*(round(t, 3) for t in (statistics.median(milliseconds), lower, upper)))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.lower:.1f}-{self.upper:.1f})"


@dataclass
class Comparison:
    """One thing measured of both."""

    what: str
    size: str
    ours_ms: Times
    detectron2_ms: Times
    same_answer: bool
    ratio: float = field(init=False)
    """Detectron2's time over ours."""
    outputs: str | None = None
    detections: int | None = None
    classes: int | None = None
    ours_mb: float | None = None
    detectron2_mb: float | None = None
    memory_share: float | None = field(init=False, default=None)
    """Our memory over Detectron2's."""
    ours_resident_mb: float | None = None
    """As the system counts: with what libraries allocate for themselves."""
    detectron2_resident_mb: float | None = None
    multiply_adds: int | None = None
    """Of an image, in direct convolutions and linear layers."""
    floor_ms: float | None = None
    """What they take at the machine's measured peak."""
    agreement: dict[str, float] = field(default_factory=dict)
    """What ``same_answer`` was judged by."""

    def __post_init__(self) -> None:
        self.ratio = round(self.detectron2_ms.median / self.ours_ms.median, 2)
        if self.ours_mb is not None and self.detectron2_mb:
            self.memory_share = round(self.ours_mb / self.detectron2_mb, 3)


@dataclass
class Peer:
    """Something else that does a part of the work."""

    what: str
    size: str
    ms: Times


def by_turns(runs: Sequence[Callable[[], T]], rounds: int) -> tuple[list[T], list[list[T]]]:
    """Run all by turns: A B A B ...

    Returns:
        What each returned in a first turn, which is not to be timed, and then in ``rounds``.
    """
    first = [run() for run in runs]
    results: list[list[T]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, run in zip(results, runs, strict=True):
            times.append(run())
    return first, results


class Stages:
    """Cuts a run into stages: what runs calls :meth:`enter` where a stage begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_enter: Callable[[str, str | None], None] = lambda stage, part_of: None

    def enter(self, stage: str, *, part_of: str | None = None) -> None:
        """
        Args:
            stage: the one that begins.
            part_of: the stage that goes on meanwhile; only :meth:`time` tells its parts apart.
        """
        self._on_enter(stage, part_of)

    def time(self, run: Callable[[], T]) -> tuple[T, dict[str, float]]:
        """What ``run`` returns, and seconds by stage, parts of which count for both; the whole of
        it under ``""``.

        A GPU is waited for in the end only; until then it notes the borders of stages itself.
        """
        on_gpu = self.device.type == "cuda"
        marks: list[tuple[set[str], Any]] = []

        def mark(stage: str, part_of: str | None = None) -> None:
            stages = {stage, part_of or stage}
            if on_gpu and torch.cuda.is_current_stream_capturing():
                return  # a graph, whose replays enter no stages
            if on_gpu:
                marks.append((stages, torch.cuda.Event(enable_timing=True)))
                marks[-1][1].record()
            else:
                marks.append((stages, time.perf_counter()))

        self._synchronize()
        start = time.perf_counter()
        with self._entering(mark):
            result = run()
            mark("")
        self._synchronize()
        seconds = {"": time.perf_counter() - start}
        for (stages, begin), (_, end) in itertools.pairwise(marks):
            elapsed = begin.elapsed_time(end) / 1000 if on_gpu else end - begin
            for stage in stages:
                seconds[stage] = seconds.get(stage, 0.0) + elapsed
        return result, seconds

    def memory(self, run: Callable[[], Any]) -> list["StageMemory"]:
        """The memory of each stage in turn, as PyTorch's allocator tells."""
        prefix = "stage: "
        device_type = {"cpu": 0, "cuda": 1}[self.device.type]  # PyTorch's numbers

        def enter(stage: str, part_of: str | None = None) -> None:
            if part_of is None:
                with record_function(prefix + stage):
                    pass

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with self._entering(enter):
                result = run()
                enter("")
            del result
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        live = 0
        stages: list[StageMemory] = []
        for event in sorted(events, key=lambda e: e.get("ts", 0)):
            if event["name"] == "[memory]" and event["args"]["Device Type"] == device_type:
                live += event["args"]["Bytes"]
                if stages:
                    stages[-1].note(live)
            elif event["name"].startswith(prefix):
                stages.append(StageMemory(event["name"].removeprefix(prefix), live, live))
        return stages[:-1]

    def resident(self, run: Callable[[], Any], *, since: str) -> int | None:
        """Bytes by which the process has grown at most, from the stage ``since`` on, over what it
        had before ``run``; None on a GPU, and where the system does not tell.

        Libraries that keep a workspace keep one for each thread. ``run`` has a thread of its own,
        so that it counts what it needs, and not what others have left.
        """
        if self.device.type != "cpu":
            return None
        try:
            _forget_peak()
            before = _status("VmRSS")
        except (OSError, AttributeError):
            return None

        def enter(stage: str, part_of: str | None) -> None:
            if stage == since:
                _forget_peak()

        with self._entering(enter), ThreadPoolExecutor(1) as thread:
            thread.submit(run).result()
        return _status("VmHWM") - before

    @contextlib.contextmanager
    def _entering(self, on_enter: Callable[[str, str | None], None]) -> Iterator[None]:
        before, self._on_enter = self._on_enter, on_enter
        try:
            yield
        finally:
            self._on_enter = before

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class StageMemory:
    """Bytes that are live in a stage, of those allocated since the run began."""

    stage: str
    low: int
    peak: int
    rise: int = 0
    """How far they rise above what they were before in the stage.

    Not ``peak`` over the start: a module's arguments are freed when it has returned, a little
    after the hook on its outputs that began the stage.
    """

    def note(self, live: int) -> None:
        self.low = min(self.low, live)
        self.peak = max(self.peak, live)
        self.rise = max(self.rise, live - self.low)


def _forget_peak() -> None:
    """Return freed memory to the system, whose peak is then what is resident now.

    Raises:
        OSError, AttributeError: elsewhere than on Linux with glibc, or not allowed.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Bytes, from what Linux tells about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def use_cores(number: int | None) -> None:
    """Let everything use so many cores; by default all that there are."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    number = number or len(available) or os.cpu_count() or 1
    torch.set_num_threads(number)
    cv2.setNumThreads(number)
    if available:  # threads of other libraries
        os.sched_setaffinity(0, available[:number])


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        **gpu,
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "detectron2": detectron2.__version__,
    }


def report(
    comparisons: Sequence[Comparison],
    peers: Sequence[Peer],
    settings: Mapping[str, Any],
    json_file: Path | None,
) -> None:
    """Print tables; write everything as JSON where asked for."""
    columns: dict[str, Callable[[Comparison], Any]] = {
        "": lambda c: c.what,
        "size": lambda c: c.size,
        "classes": lambda c: c.classes,
        "detections": lambda c: c.detections,
        "outputs": lambda c: c.outputs,
        "ours, ms an image": lambda c: c.ours_ms,
        "Detectron2": lambda c: c.detectron2_ms,
        "ratio": lambda c: f"{c.ratio:.2f}",
        "floor, ms": lambda c: c.floor_ms and f"{c.floor_ms:.1f}",
        "ours, MB": lambda c: c.ours_mb,
        "Detectron2, MB": lambda c: c.detectron2_mb,
        "share": lambda c: c.memory_share,
        "ours, resident MB": lambda c: c.ours_resident_mb,
        "Detectron2, resident MB": lambda c: c.detectron2_resident_mb,
        "same answer": lambda c: "yes" if c.same_answer else "NO",
    }
    cells = {name: [value(c) for c in comparisons] for name, value in columns.items()}
    cells = {k: column for k, column in cells.items() if any(v is not None for v in column)}
    print(tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True))
    if peers:
        rows = [(peer.what, peer.size, peer.ms) for peer in peers]
        headers = ["others", "size", "ms an image"]
        print("\n" + tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))
    if any(c.floor_ms for c in comparisons):
        print("\nFloor: the arithmetic of direct convolutions at the measured peak.")
    print("\nMedian and quartiles. " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    if json_file:
        content = {
            "environment": dict(settings),
            "same_answer": all(c.same_answer for c in comparisons),
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "peers": [asdict(peer) for peer in peers],
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n")
