"""What is lost where: the errors of all images, and what PQ would be without each kind of them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .common import mean
from .panoptic_errors import (
    KINDS,
    SIZES,
    Change,
    Changes,
    add_changes,
    find_errors,
    mended,
    perfect_outlines,
    size_of,
)
from .panoptic_matching import Category, CategoryMatches, SegmentTable, matching

MATCH, IGNORED = "match", "ignored"


class Segment(NamedTuple):
    """What became of a segment.

    Attributes:
        true: of the ground truth, or predicted.
        id: as in ``segments_info``.
        category: its own.
        area: in pixels.
        state: "match", a kind of error, or "ignored": a crowd, or excused by void or a crowd.
        iou: with the segment that it matches, or with that of the other map that it has most of.
    """

    true: bool
    id: int
    category: Category
    area: int
    state: str
    iou: float


@dataclass
class PanopticImage:
    """What is kept of an image.

    Attributes:
        matches: by category.
        segments: all true and predicted ones.
        changes: what mending each kind of error does.
        boundary: the matches of Boundary PQ, None where it is not asked for.
    """

    matches: dict[Category, CategoryMatches]
    segments: list[Segment]
    changes: Changes
    boundary: dict[Category, CategoryMatches] | None = None

    @classmethod
    def of(cls, table: SegmentTable, boundary_iou: np.ndarray | None = None) -> "PanopticImage":
        found = matching(table)
        errors = find_errors(table, found)
        iou = table.intersection / np.maximum(table.union, 1)
        best_pred = iou.max(axis=1, initial=0)
        best_gt = iou.max(axis=0, initial=0)
        matched = {gt: found.ious[pred] for pred, gt in found.pairs.items()}
        segments = []
        for true, infos, categories, areas, pairs, kinds, best in (
            (
                True,
                table.gt_segments,
                table.gt_categories,
                table.gt_area,
                matched,
                errors.false_negatives,
                best_pred,
            ),
            (
                False,
                table.pred_segments,
                table.pred_categories,
                table.pred_area,
                found.ious,
                errors.false_positives,
                best_gt,
            ),
        ):
            for place, (info, category) in enumerate(zip(infos, categories, strict=True)):
                state = MATCH if place in pairs else kinds.get(place, IGNORED)
                value = pairs.get(place, float(best[place]))
                area = int(areas[place])
                segments.append(Segment(true, int(info["id"]), category, area, state, value))
        boundary = None
        if boundary_iou is not None:
            boundary = matching(table, boundary_iou).by_category(table)
        return cls(found.by_category(table), segments, errors.changes, boundary)

    def pq(self) -> float:
        """The PQ of the image alone, in percent; nan where it has no segments."""
        return 100 * mean(matches.pq for matches in self.matches.values())


def totals_of(
    images: Iterable[Mapping[Category, CategoryMatches]], categories: Iterable[Category]
) -> dict[Category, CategoryMatches]:
    """The matches of all images, of each category."""
    totals = {category: CategoryMatches() for category in categories}
    for matches in images:
        for category, found in matches.items():
            totals[category].add(found)
    return totals


def mean_pq(totals: Mapping[Category, CategoryMatches]) -> dict[str, float]:
    """``PQ``, ``PQ_th`` and ``PQ_st`` in percent; nan without a segment."""
    splits = {"PQ": (True, False), "PQ_th": (True,), "PQ_st": (False,)}
    return {
        key: 100 * mean(total.pq for (isthing, _), total in totals.items() if isthing in kinds)
        for key, kinds in splits.items()
    }


def after(
    totals: Mapping[Category, CategoryMatches], changes: Mapping[Category, Change]
) -> dict[Category, CategoryMatches]:
    """The matches of each category once some changes are made."""
    return {
        c: mended(total, [changes[c]]) if c in changes else total for c, total in totals.items()
    }


def price(
    totals: Mapping[Category, CategoryMatches], then: Mapping[Category, CategoryMatches]
) -> dict[str, float]:
    """How much greater ``PQ``, ``PQ_th`` and ``PQ_st`` are of other matches, in percent."""
    base = mean_pq(totals)
    return {key: pq - base[key] for key, pq in mean_pq(then).items()}


def analysis(images: Iterable[PanopticImage], names: Mapping[Category, str]) -> dict[str, Any]:
    """What is lost where.

    Args:
        images: all of them.
        names: of the categories.

    Returns:
        ``PQ``, ``PQ_th``, ``PQ_st``, percent; ``prices``: for each kind of
        :mod:`~.panoptic_errors`, and for "perfect_outlines" (each match with IoU 1), how much they
        would grow, and its ``false_positives`` and ``false_negatives``; ``sizes``: for small,
        medium and large segments ``PQ``, ``segments`` (true ones) and ``errors`` by kind;
        ``classes``: for each category ``name``, ``isthing``, ``PQ``, ``SQ``, ``RQ``, ``matched``,
        ``false_positives``, ``false_negatives``, ``prices`` (growth of its PQ) and ``errors`` by
        kind. A match and a missed segment have the size of the true segment.
    """
    images = list(images)
    totals = totals_of((image.matches for image in images), names)
    changes: Changes = {}
    counts: Counter = Counter()
    sizes = [{category: CategoryMatches() for category in names} for _ in SIZES]
    true_by_size: Counter = Counter()
    for image in images:
        add_changes(changes, image.changes)
        for segment in image.segments:
            size = size_of(segment.area)
            if segment.state not in (MATCH, IGNORED):
                counts[segment.state, segment.true, segment.category, size] += 1
                matches = sizes[size][segment.category]
                if segment.true:
                    matches.false_negatives += 1
                else:
                    matches.false_positives += 1
            elif segment.state == MATCH and segment.true:
                sizes[size][segment.category].ious.append(segment.iou)
            true_by_size[size] += segment.true and segment.state != IGNORED

    of_kinds = {kind: after(totals, changes.get(kind, {})) for kind in KINDS}
    of_kinds["perfect_outlines"] = {c: perfect_outlines(total) for c, total in totals.items()}

    def number(**wanted: Any) -> int:
        fields = ("state", "true", "category", "size")
        chosen = [(fields.index(key), value) for key, value in wanted.items()]
        return sum(n for key, n in counts.items() if all(key[i] == v for i, v in chosen))

    prices = {}
    for kind, mended_totals in of_kinds.items():
        prices[kind] = {
            **price(totals, mended_totals),
            "false_positives": number(state=kind, true=False),
            "false_negatives": number(state=kind, true=True),
        }
    return {
        **mean_pq(totals),
        "images": len(images),
        "prices": prices,
        "sizes": {
            name: {
                "PQ": mean_pq(sizes[size])["PQ"],
                "segments": true_by_size[size],
                "errors": {kind: number(state=kind, size=size) for kind in KINDS},
            }
            for size, name in enumerate(SIZES)
        },
        "classes": [
            {
                "name": names[category],
                "isthing": category[0],
                **{key.upper(): 100 * getattr(total, key) for key in ("pq", "sq", "rq")},
                "matched": total.true_positives,
                "false_positives": total.false_positives,
                "false_negatives": total.false_negatives,
                "prices": {
                    kind: _growth(total, mended_totals[category])
                    for kind, mended_totals in of_kinds.items()
                },
                "errors": {kind: number(state=kind, category=category) for kind in KINDS},
            }
            for category, total in totals.items()
        ],
    }


def _growth(before: CategoryMatches, after: CategoryMatches) -> float:
    """Of PQ, in percent; nothing where no segment is left to get wrong."""
    growth = 100 * (after.pq - before.pq)
    return 0.0 if math.isnan(growth) else growth


def image_counts(
    images: Sequence[Mapping[Category, CategoryMatches]], categories: Sequence[Category]
) -> np.ndarray:
    """Sum of IoUs, matches, and mean number of unmatched segments: float64 array (3, I, C)."""
    place = {category: k for k, category in enumerate(categories)}
    counts = np.zeros((3, len(images), len(categories)))
    for k, image in enumerate(images):
        for category, matches in image.items():
            errors = 0.5 * (matches.false_positives + matches.false_negatives)
            counts[:, k, place[category]] = math.fsum(matches.ious), len(matches.ious), errors
    return counts


def resampled_pq(
    counts: np.ndarray, categories: Sequence[Category], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """``PQ``, ``PQ_th`` and ``PQ_st`` in percent of resamples.

    Args:
        counts: of :func:`image_counts`.
        categories: of them.
        weights: float64 array (B, I), how often each image is there.

    Returns:
        Of each a float64 array (B,), nan where there is no segment.
    """
    iou, matched, errors = weights @ counts
    segments = matched + errors
    pq = np.divide(iou, segments, out=np.zeros_like(iou), where=segments > 0)
    things = np.array([isthing for isthing, _ in categories], bool)
    result = {}
    for key, columns in (("PQ", slice(None)), ("PQ_th", things), ("PQ_st", ~things)):
        present = (segments[:, columns] > 0).sum(axis=1)
        total = 100 * pq[:, columns].sum(axis=1)
        empty = np.full(len(weights), np.nan)
        result[key] = np.divide(total, present, out=empty, where=present > 0)
    return result
