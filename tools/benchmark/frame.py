"""Measuring by turns: times and memory of stages, and on what."""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import detectron2
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")
MB = 2**20


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
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "detectron2": detectron2.__version__,
    }
