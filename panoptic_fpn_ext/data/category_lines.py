"""The categories of a dataset as lines of text, which travel in a config with the model."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from detectron2.data.catalog import Metadata

from ..errors import UserError
from .label_space import dataset_ids, thing_sem_seg_ids


def lines_of(metadata: Metadata) -> list[str]:
    """A line ``<id> thing|stuff <colour> <name>`` for each category, by ascending id.

    Args:
        metadata: of a dataset of ``register_panoptic_dataset``.
    """
    things, lines = metadata.thing_dataset_id_to_contiguous_id, []
    for number, place in sorted(dataset_ids(metadata).items()):
        kind = "thing" if number in things else "stuff"
        color = metadata.get(f"{kind}_colors")[place]
        name = metadata.get(f"{kind}_classes")[place]
        lines.append(f"{number} {kind} #{bytes(color).hex()} {name}")
    return lines


def label_space_of(metadata: Metadata) -> str:
    """``"separated"`` or ``"full"``, see ``register_panoptic_dataset``."""
    # By name: where a thing has id 0, that is also the id of Detectron2's class of all things.
    of_things = thing_sem_seg_ids(metadata)
    names = [metadata.stuff_classes[k] for k in of_things.values()]
    is_full = names == [metadata.thing_classes[k] for k in of_things]
    return "full" if is_full else "separated"


def categories_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The categories, as in a panoptic JSON, of :func:`lines_of`.

    Raises:
        UserError: a line of another form.
    """
    categories = []
    for line in lines:
        try:
            number, kind, color, name = line.split(maxsplit=3)
            isthing = {"stuff": 0, "thing": 1}[kind]
            categories.append(
                {
                    "id": int(number),
                    "name": name,
                    "isthing": isthing,
                    "color": list(bytes.fromhex(color.removeprefix("#"))),
                }
            )
        except (AttributeError, KeyError, ValueError) as error:
            raise UserError(
                f"MODEL.CATEGORIES: {line!r} is not like '3 thing #dc143c person'"
            ) from error
    return categories


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """In words, where kinds or names in two lists of lines differ first; None if they do not.

    Ids and colours may differ: they are not what a model has learned.
    """
    names = [
        [f"{('stuff', 'thing')[c['isthing']]} {c['name']!r}" for c in categories_of(lines)]
        for lines in (ours, theirs)
    ]
    for place, (one, other) in enumerate(zip_longest(*names, fillvalue="missing")):
        if one != other:
            return f"number {place} is {one} and {other}"
    return None
