"""The datasets that are registered when the package is imported, under ``DETECTRON2_DATASETS``.

Expected trees: ``datasets/README.md``.
"""

import os
from pathlib import Path

from .registration import register_panoptic_dataset


def register_shapes(root: Path) -> None:
    """``shapes_train`` and ``shapes_val``, which ``datasets/make_shapes.py`` generates."""
    root = root / "shapes"
    for split in ("train", "val"):
        register_panoptic_dataset(
            f"shapes_{split}",
            image_root=root / split,
            panoptic_root=root / f"panoptic_{split}",
            panoptic_json=root / "annotations" / f"panoptic_{split}.json",
            instances_json=root / "annotations" / f"instances_{split}.json",
        )


register_shapes(Path(os.environ.get("DETECTRON2_DATASETS", "datasets")))
