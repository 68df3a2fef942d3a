"""Pages: HTML files with all they need in them, which open from a disk and ask for nothing."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

KIND_TEXTS = {
    "class": ("Wrong class", "right outline, another class"),
    "thing_stuff": ("Thing or stuff", "right outline, a thing taken for stuff or the reverse"),
    "split": ("Split", "one segment predicted as several"),
    "merged": ("Merged", "several segments predicted as one"),
    "outline": ("Poor outline", "right class, IoU 0.1 to 0.5"),
    "missed": ("Missed", "no prediction comes near"),
    "made_up": ("Made up", "a prediction of nothing"),
    "perfect_outlines": ("Outlines (SQ)", "what is found had IoU 1"),
}
REASON_TEXTS = {
    "score": "INSTANCES_CONFIDENCE_THRESH: a detection of too low a score",
    "overlap": "OVERLAP_THRESH: a detection that better ones cover",
    "area": "STUFF_AREA_LIMIT: a region of too few pixels",
}


def write_page(
    path: Path,
    template: str,
    *,
    pictures: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    legend: Mapping[str, str],
    **values: Any,
) -> None:
    """Write a page; an old one stays until the new one is whole.

    Args:
        path: the file.
        template: its name in the folder ``page``.
        pictures: of :func:`~.page_pictures.picture`.
        groups: what to show together: ``title``, and ``images``, places in ``pictures``.
        legend: kinds of colours of segments, and what to call them.
        values: what else the template names.

    Raises:
        OSError: it cannot be written.
    """
    page = files(__package__) / "page"
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (page / name).read_text("utf-8")),
    )
    text = environment.get_template(template).render(
        kinds=KIND_TEXTS,
        reasons=REASON_TEXTS,
        legend=legend,
        pictures=_in_script(pictures),
        groups=_in_script(groups),
        style=(page / "page.css").read_text("utf-8"),
        script=(page / "page.js").read_text("utf-8"),
        **plain(values),
    )
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


def plain(value: Any) -> Any:
    """The same for JSON: None for nan, six decimals."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else round(float(value), 6)
    return int(value) if isinstance(value, np.integer) else value


def _in_script(value: Any) -> str:
    """As JSON in which nothing ends a script."""
    return json.dumps(plain(value)).replace("<", r"\u003c")
