"""Why PQ is what it is: each error of one kind, and what PQ would be if a kind were mended.

The errors are those of PQ's own matching: each true segment that is not found (false negative) and
each predicted one that counts and matches nothing (false positive). Every error is of exactly one
kind, the first that fits it:

``class``
    A missed and a false segment whose IoU is above 0.5, both things or both stuff, of different
    categories. Mended: the prediction gets the true category and keeps its outline.
``thing_stuff``
    The same, one of the two a thing and the other stuff.
``split``
    A piece of a true segment of its category: more than half of the false segment, void left out,
    lies in it, and another prediction of the category does too or matches it. A missed segment with
    two such pieces is of this kind as well, if they match it together. Mended: the pieces, with
    the prediction that matches, are one segment.
``merged``
    A missed segment of which more than half is in a prediction of its category that has more than
    half of another such segment, too, or matches another. So is that prediction, if it is false.
    Mended: in its place are its parts in each of these segments; the rest of it is void.
``outline``
    A missed and a false segment of one category, IoU 0.1 to 0.5; pairs are made by falling IoU.
    Mended: the prediction has the true outline, IoU 1.
``missed``
    Any other missed segment. Mended: it is predicted, IoU 1.
``made_up``
    Any other false segment. Mended: it is not there.

A mended segment takes nothing from the others: they stay as they are, even where it lies on them.
So a kind can be mended in each image by itself, and its price is the difference of two PQs.
Predictions that PQ does not count because of void or crowds take no part, nor do crowds.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .panoptic_matching import Category, CategoryMatches, Matching, SegmentTable

KINDS = ("class", "thing_stuff", "split", "merged", "outline", "missed", "made_up")
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (32**2, 96**2)  # COCO's, in pixels
POOR_IOU = 0.1  # below, two segments have nothing to do with each other


@dataclass
class Change:
    """What mending does to the matches of a category.

    Attributes:
        ious: those that are new and, negative, those that are gone; summed exactly later.
        matches, false_positives, false_negatives: how many more there are.
    """

    ious: list[float] = field(default_factory=list)
    matches: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def add(self, other: "Change") -> None:
        self.ious.extend(other.ious)
        self.matches += other.matches
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives

    def found(self, iou: float) -> None:
        """A true segment is no longer missed."""
        self.ious.append(iou)
        self.matches += 1
        self.false_negatives -= 1


Changes = dict[str, dict[Category, Change]]
"""Kind to category to what mending that kind alone does."""


@dataclass
class ImageErrors:
    """The errors of an image.

    Attributes:
        false_negatives, false_positives: the kind of each error, by its place in the true and
            predicted segments of the :class:`SegmentTable`.
        changes: what mending does; categories in which it does nothing are left out.
    """

    false_negatives: dict[int, str]
    false_positives: dict[int, str]
    changes: Changes


def find_errors(table: SegmentTable, matches: Matching) -> ImageErrors:
    """Put each error of an image into one kind; see the module.

    Args:
        table: the segments.
        matches: what :func:`matching` makes of them.
    """
    return _Sorting(table, matches).errors()


class _Sorting:
    """Errors that have no kind yet, fewer with each method."""

    def __init__(self, table: SegmentTable, matches: Matching) -> None:
        self._table, self._matches = table, matches
        self._gt, self._pred = table.gt_categories, table.pred_categories
        self._matching_pred = {gt: pred for pred, gt in matches.pairs.items()}
        self._missed = list(matches.false_negatives)
        self._false = list(matches.false_positives)
        self._fn_kinds: dict[int, str] = {}
        self._fp_kinds: dict[int, str] = {}
        self._changes: Changes = {kind: defaultdict(Change) for kind in KINDS}

    def errors(self) -> ImageErrors:
        if self._missed and self._false:
            self._categories()
        if self._false:
            self._split()
        if self._missed:
            self._merged()
        if self._missed and self._false:
            self._outlines()
        for gt in list(self._missed):
            self._is("missed", gt=gt, iou=1.0)
        for pred in list(self._false):
            self._is("made_up", pred=pred)
        changes = {kind: dict(found) for kind, found in self._changes.items() if found}
        return ImageErrors(self._fn_kinds, self._fp_kinds, changes)

    def _is(
        self, kind: str, *, gt: int | None = None, pred: int | None = None, iou: float | None = None
    ) -> None:
        """Errors are of a kind; mended, ``gt`` is found with an IoU."""
        if gt is not None:
            self._fn_kinds[gt] = kind
            self._missed.remove(gt)
            self._changes[kind][self._gt[gt]].found(iou)
        if pred is not None:
            self._fp_kinds[pred] = kind
            self._false.remove(pred)
            self._changes[kind][self._pred[pred]].false_positives -= 1

    def _better(self, kind: str, pred: int, iou: float) -> None:
        """A matched prediction has another IoU once a kind is mended."""
        change = self._changes[kind][self._pred[pred]]
        change.ious += [iou, -self._matches.ious[pred]]

    def _categories(self) -> None:
        table = self._table
        alike = table.intersection > 0.5 * table.union
        for gt, pred in np.argwhere(alike).tolist():
            if gt in self._missed and pred in self._false:
                same_sort = self._gt[gt][0] == self._pred[pred][0]
                iou = float(table.intersection[gt, pred] / table.union[gt, pred])
                self._is("class" if same_sort else "thing_stuff", gt=gt, pred=pred, iou=iou)

    def _split(self) -> None:
        table = self._table
        inside = 2 * table.intersection > table.pred_area - table.in_void
        pieces = defaultdict(list)
        for gt, pred in np.argwhere(inside).tolist():
            if pred in self._false and self._gt[gt] == self._pred[pred]:
                pieces[gt].append(pred)
        for gt, found in pieces.items():
            matched = self._matching_pred.get(gt)
            if matched is None and (gt not in self._missed or len(found) < 2):
                continue
            whole = found if matched is None else [matched, *found]
            common = table.intersection[gt, whole].sum()
            area = (table.pred_area - table.in_void)[whole].sum()
            iou = float(common / (table.gt_area[gt] + area - common))
            if matched is not None:
                self._better("split", matched, iou)
            elif iou > 0.5:
                self._is("split", gt=gt, iou=iou)
            else:
                continue
            for pred in found:
                self._is("split", pred=pred)

    def _merged(self) -> None:
        table = self._table
        within = 2 * table.intersection > table.gt_area[:, None]
        held = defaultdict(list)
        for gt, pred in np.argwhere(within).tolist():
            if gt in self._missed and self._gt[gt] == self._pred[pred]:
                held[pred].append(gt)
        for pred, found in held.items():
            matched = self._matches.pairs.get(pred)
            if matched is None and (pred not in self._false or len(found) < 2):
                continue
            if matched is None:
                self._is("merged", pred=pred)
            else:
                iou = table.intersection[matched, pred] / table.gt_area[matched]
                self._better("merged", pred, float(iou))
            for gt in found:
                self._is(
                    "merged", gt=gt, iou=float(table.intersection[gt, pred] / table.gt_area[gt])
                )

    def _outlines(self) -> None:
        table = self._table
        pairs = []
        for gt in self._missed:
            for pred in self._false:
                if self._gt[gt] == self._pred[pred] and table.intersection[gt, pred]:
                    iou = table.intersection[gt, pred] / table.union[gt, pred]
                    if iou >= POOR_IOU:
                        pairs.append((-iou, gt, pred))
        for _, gt, pred in sorted(pairs):
            if gt in self._missed and pred in self._false:
                self._is("outline", gt=gt, pred=pred, iou=1.0)


def mended(matches: CategoryMatches, changes: Iterable[Change]) -> CategoryMatches:
    """The matches of a category once some changes are made.

    Its IoUs that are gone are still there, and beside them what takes them away; so only its PQ
    (``pq``), RQ and SQ may be asked for by way of :class:`_Mended`.
    """
    total = _Mended(list(matches.ious), matches.false_positives, matches.false_negatives)
    total.number = matches.true_positives
    for change in changes:
        total.ious += change.ious
        total.number += change.matches
        total.false_positives += change.false_positives
        total.false_negatives += change.false_negatives
    return total


@dataclass
class _Mended(CategoryMatches):
    number: int = 0

    @property
    def true_positives(self) -> int:
        return self.number


def perfect_outlines(matches: CategoryMatches) -> CategoryMatches:
    """The matches of a category if each match had IoU 1: its PQ is its RQ."""
    ones = [1.0] * matches.true_positives
    return CategoryMatches(ones, matches.false_positives, matches.false_negatives)


def size_of(area: float) -> int:
    """Place in :data:`SIZES`."""
    return int(np.searchsorted(SIZE_LIMITS, area, side="right"))


def add_changes(totals: Changes, changes: Mapping[str, Mapping[Category, Change]]) -> None:
    """Add those of an image to those of others."""
    for kind, by_category in changes.items():
        for category, change in by_category.items():
            totals.setdefault(kind, {}).setdefault(category, Change()).add(change)
