"""What was measured: as tables, as JSON, and read again."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from panoptic_fpn_ext import UserError

WHOLE = (
    "whole image",
    "after the network",
    "training step",
    "semantic head's step, sum",
    "data",
    "PQ + mIoU + AP",
    "eval-only",
)
"""What is told of a file in short; of one without these everything."""


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

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Comparison":
        """From what :func:`report` has written of one."""
        given = {f.name: content[f.name] for f in fields(cls) if f.init and f.name in content}
        times = {side: Times(**given[side]) for side in ("ours_ms", "detectron2_ms")}
        comparison = cls(**{**given, **times})
        if not (isinstance(comparison.what, str) and 0 < comparison.ratio < float("inf")):
            raise ValueError
        return comparison


@dataclass
class Peer:
    """Something else that does a part of the work."""

    what: str
    size: str
    ms: Times


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


def read(file: Path) -> tuple[dict[str, Any], list[Comparison]]:
    """
    Returns:
        All that a command of the benchmark has written, and its comparisons, those that tell the
        whole.

    Raises:
        UserError: not such a file.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("environment"), dict):
        raise UserError(f"{file}: not written by this benchmark: it has no environment")
    try:
        comparisons = [Comparison.of(c) for c in content.get("comparisons", ())]
    except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: its comparisons are not as this benchmark writes them") from error
    return content, [c for c in comparisons if c.what.startswith(WHOLE)] or comparisons
