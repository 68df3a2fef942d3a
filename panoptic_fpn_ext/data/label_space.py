"""How the semantic classes of a dataset relate to its thing categories, told by its metadata."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data.catalog import Metadata


def thing_sem_seg_ids(metadata: Metadata) -> dict[int, int]:
    """The semantic class of each thing category of a dataset.

    Datasets of ``register_panoptic_dataset`` say it themselves. Of others, Detectron2's included,
    the class names tell: where every thing category is a semantic class too, the label space is
    full (``cityscapes_fine_panoptic_*``, ``coco_2017_*_panoptic``); elsewhere class 0 is all things
    together (``coco_2017_*_panoptic_separated``).

    Returns:
        Contiguous thing category -> semantic class. These classes never become stuff segments.
    """
    declared = metadata.get("thing_sem_seg_ids", None)
    if declared is not None:
        return dict(enumerate(declared))
    things = list(metadata.get("thing_classes", ()))
    classes = list(metadata.get("stuff_classes", ()))
    # In a full label space of Detectron2 `thing_classes` names the stuff categories as well.
    categories = metadata.get("thing_dataset_id_to_contiguous_id", None)
    categories = range(len(things)) if categories is None else sorted(categories.values())
    if things and set(things) <= set(classes):
        return {category: classes.index(things[category]) for category in categories}
    return dict.fromkeys(categories, 0)


def dataset_ids(metadata: Metadata) -> dict[int, int]:
    """The ids of the categories of a dataset, and their contiguous ones, of things or of semantic
    classes; without that of the class "things" where no category is called so."""
    things = metadata.thing_dataset_id_to_contiguous_id
    of_things = set(thing_sem_seg_ids(metadata).values())
    stuff = metadata.stuff_dataset_id_to_contiguous_id.items()
    return {k: v for k, v in stuff if k not in things and v not in of_things} | things


def with_isthing(
    segments_info: Sequence[Mapping[str, Any]], thing_sem_seg_ids: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Segments that say whether they are things.

    Those of Detectron2's Cityscapes do not; their things and stuff share one range of ids.

    Args:
        segments_info: segments with contiguous ``category_id``.
        thing_sem_seg_ids: see :func:`thing_sem_seg_ids`.
    """
    return [{"isthing": info["category_id"] in thing_sem_seg_ids, **info} for info in segments_info]
