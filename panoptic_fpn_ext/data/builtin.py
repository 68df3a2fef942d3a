"""The datasets that importing the package registers, under ``DETECTRON2_DATASETS``.

Expected trees: ``datasets/README.md``.
"""

import os
from pathlib import Path
from typing import Any

from cityscapesscripts.helpers.labels import labels as CITYSCAPES_LABELS
from detectron2.data.datasets import builtin_meta

from .registration import register_panoptic_dataset

COCO_CATEGORIES = [
    {**category, "name": category["name"].replace("-other", "").replace("-merged", "")}
    for category in builtin_meta.COCO_CATEGORIES
]
"""The categories of COCO panoptic, by the names that Detectron2 gives them."""

CITYSCAPES_CATEGORIES = [
    {
        "id": label.id,
        "name": label.name,
        "isthing": int(label.hasInstances),
        "color": list(label.color),
    }
    for label in CITYSCAPES_LABELS
    if not label.ignoreInEval
]
"""The categories that cityscapesscripts' ``createPanopticImgs`` writes, in order of (train) id."""


def register_shapes(root: Path) -> None:
    """``shapes_train`` and ``shapes_val``, which ``datasets/make_shapes.py`` generates."""
    for split in ("train", "val"):
        register_panoptic_dataset(
            f"shapes_{split}",
            image_root=root / split,
            panoptic_root=root / f"panoptic_{split}",
            panoptic_json=root / "annotations" / f"panoptic_{split}.json",
            instances_json=root / "annotations" / f"instances_{split}.json",
        )


def register_coco(root: Path) -> None:
    """``coco_2017_{train,val,val_100,test-dev}_panoptic_fpn``; ``val_100`` is Detectron2's small
    set, ``test-dev`` has images alone."""
    for split in ("train", "val", "val_100"):
        images, _, part = split.partition("_")
        annotations = f"{images}2017_{part}" if part else f"{images}2017"
        register_panoptic_dataset(
            f"coco_2017_{split}_panoptic_fpn",
            image_root=root / f"{images}2017",
            panoptic_root=root / f"panoptic_{images}2017",
            panoptic_json=root / "annotations" / f"panoptic_{annotations}.json",
            instances_json=root / "annotations" / f"instances_{annotations}.json",
            categories=COCO_CATEGORIES,
        )
    register_panoptic_dataset(
        "coco_2017_test-dev_panoptic_fpn",
        image_root=root / "test2017",
        panoptic_root=None,
        panoptic_json=root / "annotations" / "image_info_test-dev2017.json",
        categories=COCO_CATEGORIES,
        submission_name="panoptic_test-dev2017_panoptic-fpn_results",
    )


def register_cityscapes(root: Path, name: str) -> None:
    """``<name>_train`` and ``<name>_val``, of any tree in the layout of Cityscapes."""
    for split in ("train", "val"):
        panoptic = root / "gtFine" / f"cityscapes_panoptic_{split}"
        register_panoptic_dataset(
            f"{name}_{split}",
            image_root=root / "leftImg8bit" / split,
            panoptic_root=panoptic,
            panoptic_json=panoptic.with_suffix(".json"),
            label_space="full",
            categories=CITYSCAPES_CATEGORIES,
            evaluators=("panoptic_seg", "cityscapes_sem_seg", "cityscapes_instances"),
            image_file_name=cityscapes_image,
            gt_dir=str(root / "gtFine" / split),
            submission_name=panoptic.name,
        )


def cityscapes_image(image: dict[str, Any]) -> str:
    """The path of an image of a Cityscapes panoptic JSON, whose ``file_name`` names no file."""
    city = image["id"].partition("_")[0]
    return f"{city}/{image['id']}_leftImg8bit.png"


_root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
register_shapes(_root / "shapes")
register_cityscapes(_root / "shapes_cityscapes", "shapes_cityscapes")
register_coco(_root / "coco")
register_cityscapes(_root / "cityscapes", "cityscapes_fine_panoptic_fpn")
