"""Registering datasets in the COCO panoptic format (https://cocodataset.org/#format-data).

Nothing is read before it is needed: categories when metadata is first asked for, records when the
dataset is loaded.
"""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..errors import UserError
from .coco_json import category_faults, raise_first
from .records import load_panoptic_dataset, read_categories
from .virtual_files import INSTANCES_PREFIX

LABEL_SPACES = ("separated", "full")


def register_panoptic_dataset(
    name: str,
    image_root: str | os.PathLike,
    panoptic_root: str | os.PathLike | None,
    panoptic_json: str | os.PathLike,
    instances_json: str | os.PathLike | None = None,
    *,
    label_space: str = "separated",
    categories: Sequence[dict[str, Any]] | None = None,
    evaluators: Sequence[str] | None = None,
    **metadata: Any,
) -> None:
    """Register a dataset in the COCO panoptic format with Detectron2's catalogs.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs; None for images without annotations, as those
            of a test server, of which ``panoptic_json`` has ``images`` and ``categories``.
        panoptic_json: the panoptic annotations.
        instances_json: COCO instance annotations of the same images; used for the instance branch
            in place of the panoptic segments.
        label_space: semantic classes. ``"separated"``: class 0 is all things together, then the
            stuff categories (as for COCO). ``"full"``: every category has its own, in the order
            of their ids (as for Cityscapes).
        categories: the ``categories`` of the JSON, where they are known without reading it.
        evaluators: names in ``EVALUATOR_REGISTRY``: what the dataset is evaluated with; by default
            ``"panoptic_seg"``, ``"sem_seg"`` and ``"instances"``, without annotations nothing.
        metadata: anything else to keep in the dataset's metadata. With ``image_file_name``, a
            function, an image's path below ``image_root`` is what that gives for its entry in the
            JSON's ``images``; by default the entry's ``file_name``.

    Once more with the same arguments, as a cell of a notebook does that is run again, it does
    nothing.

    Raises:
        UserError: a name that is taken, or a label space that does not exist.
    """
    if label_space not in LABEL_SPACES:
        raise UserError(f"dataset {name}: label_space {label_space!r} is not one of {LABEL_SPACES}")
    if evaluators is None:
        evaluators = ("panoptic_seg", "sem_seg", "instances") if panoptic_root else ()
    arguments = {
        "image_root": str(image_root),
        "panoptic_root": str(panoptic_root) if panoptic_root else None,
        "panoptic_json": str(panoptic_json),
        "instances_json": str(instances_json) if instances_json else None,
        "label_space": label_space,
        "categories": copy.deepcopy(categories),
        "evaluators": tuple(evaluators),
        **metadata,
    }
    if name in DatasetCatalog.list():
        _refuse_others(name, arguments)
        return
    MetadataCatalog[name] = _LazyMetadata(
        arguments,
        name=name,
        image_root=arguments["image_root"],
        panoptic_json=arguments["panoptic_json"],
        evaluators=arguments["evaluators"],
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **({"panoptic_root": str(panoptic_root)} if panoptic_root else {}),
        **({"json_file": str(instances_json)} if instances_json else {}),
        **metadata,
    )
    DatasetCatalog.register(name, lambda: load_panoptic_dataset(name))


def _refuse_others(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise UserError if a registered dataset has other arguments than these."""
    registered = MetadataCatalog.get(name).__dict__.get("_arguments")
    if registered is None:
        raise UserError(f"dataset {name}: another one is registered by this name: choose another")

    for key in {**registered, **arguments}:
        old, new = registered.get(key), arguments.get(key)
        if _content(old) != _content(new):
            what = f"{key} {old!r}, not {new!r}"
            raise UserError(
                f"dataset {name}: registered already with {what if len(what) < 200 else key}: "
                f"choose another name, or call DatasetCatalog.remove({name!r}) first"
            )


def _content(value: Any) -> Any:
    """What to compare: a function of a notebook is a new one each time its cell is run."""
    if not inspect.isfunction(value):
        return value
    variables = [cell.cell_contents for cell in value.__closure__ or ()]
    return value.__code__, value.__defaults__, variables


def register_datasets_of_config(cfg: CfgNode) -> None:
    """Register the datasets of ``DATASETS.PANOPTIC``.

    Raises:
        UserError: an entry that is not a dict of arguments of :func:`register_panoptic_dataset`,
            or one that this refuses.
    """
    known = dict(inspect.signature(register_panoptic_dataset).parameters)
    del known["metadata"]
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    for index, arguments in enumerate(cfg.DATASETS.get("PANOPTIC", ())):
        key = f"DATASETS.PANOPTIC[{index}]"
        if not isinstance(arguments, dict):
            raise UserError(f"{key}: {arguments!r} is not a dict with {', '.join(required)}")
        for name in required:
            if name not in arguments:
                raise UserError(f"{key}: no {name!r}; needed are {', '.join(required)}")
        for name in arguments:
            if name not in known:
                raise UserError(f"{key}: unknown {name!r}; allowed are {', '.join(known)}")
        try:
            register_panoptic_dataset(**arguments)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def set_categories(
    name: str, categories: Sequence[dict[str, Any]], label_space: str, *, source: str
) -> None:
    """Give a dataset, registered or not, the categories that its annotations would, were they here.

    Args:
        name: the dataset.
        categories, label_space, source: see :func:`categories_to_metadata`.
    """
    metadata = MetadataCatalog.get(name)
    metadata.__dict__.pop("_load", None)
    metadata.set(**categories_to_metadata(categories, label_space=label_space, source=source))


def categories_to_metadata(
    categories: Sequence[dict[str, Any]], *, label_space: str, source: str
) -> dict[str, Any]:
    """Detectron2 metadata (class names, colours, id maps) of COCO panoptic categories.

    Args:
        categories: dicts with ``id``, ``name``, ``isthing`` and, optionally, ``color``.
        label_space: see :func:`register_panoptic_dataset`.
        source: the file they come from, for error messages.

    Raises:
        UserError: the first fault in the categories.
    """
    raise_first(category_faults(categories, source=source))
    # By id, as Detectron2 and pycocotools order them.
    categories = sorted(categories, key=lambda category: category["id"])
    things = [c for c in categories if c["isthing"]]
    stuff = [c for c in categories if not c["isthing"]]
    if label_space == "full":
        sem_seg = categories
    elif things:
        name = "things"
        while any(c["name"] == name for c in stuff):
            name = f"all {name}"
        sem_seg = [{"id": 0, "name": name, "color": [82, 18, 128]}, *stuff]
        if any(c["id"] == 0 for c in stuff):
            sem_seg[0]["id"] = -1
    else:
        sem_seg = stuff
    sem_seg_ids = {c["id"]: i for i, c in enumerate(sem_seg)}
    return {
        "thing_classes": [c["name"] for c in things],
        "thing_colors": [_color(c) for c in things],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "stuff_classes": [c["name"] for c in sem_seg],
        "stuff_colors": [_color(c) for c in sem_seg],
        "stuff_dataset_id_to_contiguous_id": sem_seg_ids,
        "thing_sem_seg_ids": tuple(
            sem_seg_ids[c["id"]] if label_space == "full" else 0 for c in things
        ),
    }


class _LazyMetadata(Metadata):
    """Metadata whose class names, colours and id maps are loaded when first asked for.

    Without an instances JSON ``json_file``, by which Detectron2's COCOEvaluator finds it, is the
    name of one made of the panoptic PNGs; it is not in :meth:`as_dict`.
    """

    def __init__(self, arguments: Mapping[str, Any] | None = None, /, **attributes: Any) -> None:
        """
        Args:
            arguments: of :func:`register_panoptic_dataset`; None for a copy, which is filled later.
            attributes: what is known at once.
        """
        super().__init__(**attributes)
        if arguments is not None:
            self.__dict__.update(_arguments=arguments, _load=True)

    def __getattr__(self, key: str) -> Any:
        if key == "json_file":
            return f"{INSTANCES_PREFIX}{self.name}"
        if key.startswith("__") or not self.__dict__.pop("_load", False):
            return super().__getattr__(key)
        source = self._arguments["panoptic_json"]
        try:
            categories = self._arguments["categories"]
            if categories is None:
                categories = read_categories(source)
            label_space = self._arguments["label_space"]
            self.set(**categories_to_metadata(categories, label_space=label_space, source=source))
        except BaseException:
            self.__dict__["_load"] = True
            raise
        return getattr(self, key)

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().as_dict().items() if k not in ("_arguments", "_load")}


def _color(category: dict[str, Any]) -> list[int]:
    """The category's colour (R, G, B), or else one made from its id, always the same."""
    if "color" in category:
        return list(category["color"])
    return [(category["id"] * step) % 256 for step in (37, 101, 197)]
