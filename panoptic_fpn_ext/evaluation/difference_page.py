"""A page that shows what changed between two evaluations of one dataset, as report.html one."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .analysis import MATCH
from .page_pictures import GAINED, LOST, picture
from .pages import KIND_TEXTS, REASON_TEXTS, write_page
from .panoptic_errors import KINDS
from .report_maps import KeptMaps

logger = logging.getLogger(__name__)

MOST_IMAGES = 60
CHANGES = {"better": "Biggest gains", "worse": "Biggest losses"}
LEGEND = {
    **{kind: KIND_TEXTS[kind][0] for kind in KINDS},
    GAINED: "Truth that B alone finds",
    LOST: "Truth that A alone finds",
    MATCH: "Found",
}


def write_difference_page(
    path: Path,
    result: Mapping[str, Any],
    runs: Sequence[tuple[str, Mapping[str, Any], KeptMaps | None]],
) -> int:
    """Write the page.

    Args:
        path: the file.
        result: how the second run differs from the first: ``scores``, ``config``, ``better``,
            ``worse`` and the rest that ``tools/compare.py`` writes.
        runs: of both the name, what is in its report.json, and its maps.

    Returns:
        How many images it shows. One whose file cannot be read is left out, with a warning.

    Raises:
        UserError: the page cannot be written, or the maps are damaged.
    """
    (_, a, _), (_, b, _) = runs
    pictures, places = _pictures(result, runs)
    groups = [
        {"title": title, "images": [places[name] for name in names if name in places]}
        for title, names in _titles(result)
    ]
    values = {
        "dataset": a["dataset"],
        "runs": [{"name": name, "run": run.get("run", {})} for name, run, _ in runs],
        "result": result,
        "headlines": {"PQ": "PQ", "PQ_th": "PQ things", "PQ_st": "PQ stuff"},
        "classes": _classes(result, a["analysis"]["classes"]),
        "prices": _prices(a, b),
        "images": {
            title: [{**change, "place": places.get(change["image"])} for change in result[which]]
            for which, title in CHANGES.items()
        },
    }
    try:
        write_page(
            path,
            "difference.html.jinja",
            pictures=pictures,
            groups=[group for group in groups if group["images"]],
            legend=LEGEND,
            **values,
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return len(pictures)


def _titles(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Headings, and the images under each; the most changed first."""
    for which, title in CHANGES.items():
        yield f"{title} by PQ of the image", [c["image"] for c in result[which]]
    for name, images in result["images_of_classes"].items():
        which = "better" if result["scores"][name]["difference"] > 0 else "worse"
        yield f"{CHANGES[which]} of class: {name}", images


def _pictures(
    result: Mapping[str, Any],
    runs: Sequence[tuple[str, Mapping[str, Any], KeptMaps | None]],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What is shown of images, and the place of each by its name."""
    kept = [maps for _, _, maps in runs]
    if any(maps is None for maps in kept):
        return [], {}
    run = runs[0][1]
    names = {
        tuple(category): entry["name"]
        for category, entry in zip(run["categories"], run["analysis"]["classes"], strict=True)
    }
    metadata = kept[0].metadata()
    captions = {c["image"]: _caption(c) for c in result["changes"]}
    pictures: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for _, images in _titles(result):
        for name in images:
            if name in places or len(places) == MOST_IMAGES or not all(name in m for m in kept):
                continue
            shown = {label: maps[name] for label, maps in zip("AB", kept, strict=True)}
            try:
                pictures.append(picture(shown, names, metadata, captions[name]))
            except UserError as error:
                logger.warning("%s is not shown: %s", name, error)
                continue
            places[name] = len(places)
    return pictures, places


def _caption(change: Mapping[str, Any]) -> str:
    name, a, b = os.path.basename(change["image"]), change["a"], change["b"]
    return f"{name} · PQ {a:.1f} → {b:.1f} ({b - a:+.1f})"


def _classes(
    result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each class name, kind and score; those first whose change is sure, then by its size."""
    rows = [
        {"name": entry["name"], "isthing": entry["isthing"], **result["scores"][entry["name"]]}
        for entry in entries
    ]
    return sorted(rows, key=lambda row: (not row["sure"], -abs(row["difference"] or 0)))


def _prices(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each kind of error, and what merging drops, costs each run."""
    ours, theirs = (run["analysis"].get("prices", {}) for run in (a, b))
    rows = [
        {"kind": kind, "title": title, "text": text, "a": ours[kind]["PQ"], "b": theirs[kind]["PQ"]}
        for kind, (title, text) in KIND_TEXTS.items()
        if kind in ours and kind in theirs
    ]
    ours, theirs = (run.get("merging") or {} for run in (a, b))
    for reason, text in REASON_TEXTS.items():
        if reason in ours and reason in theirs:
            prices = {"a": ours[reason]["PQ"], "b": theirs[reason]["PQ"]}
            rows.append(
                {"kind": "merging", "title": f"Dropped by {reason}", "text": text, **prices}
            )
    return rows
