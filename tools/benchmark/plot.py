"""One picture of what the other commands have written."""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from panoptic_fpn_ext import UserError

from .results import Comparison, read

FASTER, SLOWER = "#0072B2", "#D55E00"  # which everybody can tell apart
Groups = Mapping[str, Mapping[tuple, Sequence[Comparison]]]


def plot(args: argparse.Namespace) -> int:
    """Draw how many times as fast as Detectron2 is what was measured."""
    groups: dict[str, dict[tuple, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for file in args.files:
        content, comparisons = read(file)
        if not comparisons:
            raise UserError(f"{file}: it compares no times")
        for c in comparisons:
            groups[heading(content["environment"])][c.what, c.size, c.outputs].append(c)
    # Small, with text that can be searched, and the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmark"}):
        try:
            draw(groups).savefig(args.output, dpi=150, metadata={"Date": None})
        except OSError as error:
            raise UserError(f"{args.output}: {error.strerror}") from error
    return 0


def heading(environment: Mapping[str, Any]) -> str:
    """The processor, and what else bars must share to stand together."""
    told = [environment.get("gpu")]
    if told == [None]:
        cores = environment.get("cores")
        told = [environment.get("cpu"), environment.get("instructions")]
        told.append(cores and f"{cores} core{'s' * (cores != 1)}")
    told += [environment.get("backbone"), environment.get("precision")]
    if other := environment.get("detectron2_precision"):
        told.append(f"Detectron2 {other}")
    if "precision" in environment and environment.get("images", 1) != 1:
        told.append(f"{environment['images']} images")
    options = [str(option) for option in environment.get("opts", ())]
    options[::2] = [key.rpartition(".")[2] for key in options[::2]]
    told.append(" ".join(options))
    return ", ".join(str(part) for part in told if part)


def label(rows: Sequence[Comparison]) -> str:
    """What was measured, and over which numbers of detections and classes."""
    told = [rows[0].what, rows[0].size]
    if detections := {row.detections for row in rows} - {None}:
        told.append(f"{span(detections)} detections")
    if len(classes := {row.classes for row in rows} - {None}) > 1:
        told.append(f"{span(classes)} classes")
    told.append(rows[0].outputs)
    told.append("" if all(row.same_answer for row in rows) else "ANSWERS DIFFER")
    return ", ".join(part for part in told if part)


def span(values: Iterable[float]) -> str:
    return "–".join(f"{value:.3g}" for value in sorted({min(values), max(values)}))


def draw(groups: Groups) -> Figure:
    """A panel for each heading; in it a bar for the median ratio of each label, and a line from
    the least to the greatest."""
    sizes = [len(bars) for bars in groups.values()]
    figure = Figure(figsize=(8.5, 0.6 + 0.26 * sum(sizes) + 0.5 * len(sizes)), layout="constrained")
    panels = figure.subplots(
        len(sizes), sharex=True, squeeze=False, height_ratios=[s + 0.5 for s in sizes]
    )[:, 0]
    for panel, (title, bars) in zip(panels, groups.items(), strict=True):
        panel.set_title(title, loc="left", fontsize=9, fontweight="bold")
        for y, rows in enumerate(bars.values()):
            ratios = sorted(row.ratio for row in rows)
            ratio = statistics.median(ratios)
            panel.barh(y, ratio - 1, left=1, height=0.7, color=FASTER if ratio >= 1 else SLOWER)
            panel.plot([ratios[0], ratios[-1]], [y, y], color="black", linewidth=1.2)
            panel.annotate(
                span(ratios),
                (max(ratios[-1], 1), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_yticks(range(len(bars)), map(label, bars.values()), fontsize=8)
        panel.set_ylim(len(bars) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    every = [row.ratio for bars in groups.values() for rows in bars.values() for row in rows]
    axis = panels[-1]
    axis.set_xscale("log")
    axis.set_xlim(min(0.9, 0.9 * min(every)), 1.3 * max(2, *every))  # room for the numbers
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("times as fast as Detectron2", fontsize=9)
    return figure
