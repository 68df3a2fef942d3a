#!/usr/bin/env python
r"""What changed between two evaluations of one dataset, and how sure that is.

    python tools/compare.py output/a output/b --html difference.html --json difference.json

Reads OUTPUT_DIR/inference/report.json of both and, for the pictures of the page, report_maps.zip
beside them. Differences are B minus A; intervals are of 95 %, by a paired bootstrap over the images
that both have.

Exit status: 0, or 2 where something cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.evaluation.analysis import resampled_pq
from panoptic_fpn_ext.evaluation.bootstrap import ends, resamples
from panoptic_fpn_ext.evaluation.difference_page import write_difference_page
from panoptic_fpn_ext.evaluation.report_maps import NAME as MAPS
from panoptic_fpn_ext.evaluation.report_maps import kept_maps

DIFFERENCES = ("", ".1f", ".1f", "+.1f", "+.1f", "+.1f", "")
CHANGED_IMAGES = 12  # of those better, and of those worse
PRINTED_IMAGES = 5
OF_CLASS = 3  # images of each class whose change is sure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="RUN_A", help="output folder, or report.json")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    args = parser.parse_args(arguments)
    try:
        reports = [read(path) for path in (args.a, args.b)]
        result = compare(*reports)
        if args.html:
            number = write_html(args.html, result, (args.a, args.b), reports)
        if args.json:
            try:
                args.json.write_text(json.dumps(result, indent=2), "utf-8")
            except OSError as error:
                raise UserError(f"--json {args.json}: {error.strerror}") from error
    except UserError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    print(text(result))
    if args.html:
        print(f"\n{args.html} shows {number} images of both runs")
    return 0


def write_html(
    page: Path, result: dict[str, Any], paths: Sequence[Path], reports: Sequence[dict[str, Any]]
) -> int:
    """Write the page; how many images it shows.

    Raises:
        UserError: it cannot be written, or the maps of a run are damaged.
    """
    with ExitStack() as stack:
        runs = []
        for path, report in zip(paths, reports, strict=True):
            maps = report_of(path).with_name(MAPS)
            kept = stack.enter_context(kept_maps(maps))
            if kept is None:
                print(f"compare.py: no pictures: {maps} is not there", file=sys.stderr)
            runs.append((str(path), report, kept))
        return write_difference_page(page, result, runs)


def report_of(path: Path) -> Path:
    """Where the report.json of a run is."""
    return path / "inference" / "report.json" if path.is_dir() else path


def read(path: Path) -> dict[str, Any]:
    """The numbers of a run.

    Raises:
        UserError: there are none.
    """
    path = report_of(path)
    try:
        content = json.loads(path.read_text("utf-8"))
        if {"dataset", "analysis", "categories", "image_counts", "config"} <= content.keys():
            return content
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; evaluate with TEST.REPORT True to have it"
        ) from error
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path}: not a report.json of panoptic_fpn_ext")


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How B differs from A.

    Returns:
        ``images`` that both have; ``scores``: of ``PQ``, ``PQ_th``, ``PQ_st`` and of each class,
        ``a``, ``b``, ``difference``, ``low``, ``high`` and ``sure`` (the interval does not hold 0);
        ``config``: keys with the values of A and B, None for the default; ``changes``: of each
        image ``image``, ``a``, ``b`` and ``difference`` of its own PQ, the worst first; ``better``
        and ``worse``, the first of them; ``images_of_classes``: those that changed most of each
        class whose change is sure.

    Raises:
        UserError: they have other classes, or no image in common.
    """
    names = [[entry["name"] for entry in run["analysis"]["classes"]] for run in (a, b)]
    if names[0] != names[1] or a["categories"] != b["categories"]:
        raise UserError(f"RUN_A is of {a['dataset']} and RUN_B of {b['dataset']}: other classes")
    of_images = [dict(map(tuple, run["image_counts"])) for run in (a, b)]
    common = [name for name in of_images[0] if name in of_images[1]]
    if not common:
        raise UserError("RUN_A and RUN_B have no image in common")
    categories = [tuple(category) for category in a["categories"]]
    counts = [_counts([images[name] for name in common], len(categories)) for images in of_images]

    drawn = resamples(len(common))
    weights = np.concatenate([np.ones((1, len(common))), drawn])
    pq_of = [resampled_pq(c, categories, weights) for c in counts]
    for values, c in zip(pq_of, counts, strict=True):
        iou, matched, errors = weights @ c
        with np.errstate(invalid="ignore"):
            values.update(zip(names[0], (100 * iou / (matched + errors)).T, strict=True))
    scores = {}
    for key, ours in pq_of[0].items():
        theirs = pq_of[1][key]
        low, high = ends((theirs - ours)[1:])
        scores[key] = {
            **{"a": ours[0], "b": theirs[0], "difference": theirs[0] - ours[0]},
            **{"low": low, "high": high, "sure": bool(low > 0 or high < 0)},
        }
    each = [resampled_pq(c, categories, np.eye(len(common)))["PQ"] for c in counts]
    order = np.argsort(each[1] - each[0], kind="stable")
    changed = [
        {
            "image": common[k],
            "a": each[0][k],
            "b": each[1][k],
            "difference": each[1][k] - each[0][k],
        }
        for k in order
        if not np.isnan(each[1][k] - each[0][k])
    ]
    configs = [{key: value for key, value, _ in run["config"]} for run in (a, b)]
    return _plain(
        {
            "images": len(common),
            "left_out": [len(images) - len(common) for images in of_images],
            "scores": scores,
            "config": {
                key: [config.get(key) for config in configs]
                for key in sorted(configs[0] | configs[1])
                if configs[0].get(key) != configs[1].get(key)
            },
            "better": [c for c in changed[::-1] if c["difference"] > 0][:CHANGED_IMAGES],
            "worse": [c for c in changed if c["difference"] < 0][:CHANGED_IMAGES],
            "changes": changed,
            "images_of_classes": {
                name: [common[k] for k in _most_changed(counts, k, scores[name]["difference"] > 0)]
                for k, name in enumerate(names[0])
                if scores[name]["sure"]
            },
        }
    )


def _most_changed(counts: Sequence[np.ndarray], category: int, better: bool) -> list[int]:
    """The images in which the PQ of a category grew most, or fell most."""
    with np.errstate(invalid="ignore"):
        a, b = (
            iou / (matched + errors) for iou, matched, errors in (c[..., category] for c in counts)
        )
    growth = np.nan_to_num(b - a) * (1 if better else -1)
    order = np.argsort(-growth, kind="stable")[:OF_CLASS]
    return [int(k) for k in order if growth[k] > 0]


def _counts(images: Sequence[Sequence[Any]], categories: int) -> np.ndarray:
    """As :func:`panoptic_fpn_ext.evaluation.analysis.image_counts`."""
    counts = np.zeros((3, len(images), categories))
    for k, image in enumerate(images):
        for place, iou, matched, false_positives, false_negatives in image:
            counts[:, k, place] = iou, matched, 0.5 * (false_positives + false_negatives)
    return counts


def _plain(value: Any) -> Any:
    """The same for JSON, None for nan."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return None if np.isnan(value) else float(value)
    return value


def text(result: dict[str, Any]) -> str:
    """What the terminal shows."""
    rows = [
        (key, *(s[k] for k in ("a", "b", "difference", "low", "high")), "*" if s["sure"] else "")
        for key, s in result["scores"].items()
    ]
    headers = ("PQ of", "A", "B", "B - A", "low", "high", "")
    parts = [
        f"{result['images']} images; * where the 95 % interval of the difference does not hold 0",
        tabulate(rows, headers, tablefmt="github", floatfmt=DIFFERENCES),
    ]
    if any(result["left_out"]):
        parts.append("images of one run alone: A {}, B {}".format(*result["left_out"]))
    if result["config"]:
        rows = [(key, *values) for key, values in result["config"].items()]
        parts.append(tabulate(rows, ("config", "A", "B"), tablefmt="github", missingval="default"))
    for which in ("better", "worse"):
        shown = result[which][:PRINTED_IMAGES]
        rows = [(c["image"], c["a"], c["b"], c["difference"]) for c in shown]
        if rows:
            headers = (f"most {which}", "A", "B", "B - A")
            parts.append(tabulate(rows, headers, tablefmt="github", floatfmt=DIFFERENCES))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
