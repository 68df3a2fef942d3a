#!/usr/bin/env python
"""Make the panoptic annotations of Cityscapes, with cityscapesscripts' own converter.

    python datasets/prepare_cityscapes.py                                # datasets/cityscapes
    python datasets/prepare_cityscapes.py datasets/shapes_cityscapes

From gtFine/{train,val}/<city>/*_gtFine_instanceIds.png it makes, in gtFine/, the PNGs
cityscapes_panoptic_{train,val}/ and cityscapes_panoptic_{train,val}.json.
"""

import argparse
import os
import sys
from pathlib import Path

from cityscapesscripts.preparation import createTrainIdLabelImgs
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

SPLITS = ("train", "val")


def main(arguments: list[str] | None = None) -> int:
    datasets = Path(os.getenv("DETECTRON2_DATASETS", "datasets"))
    default = Path(os.getenv("CITYSCAPES_DATASET", datasets / "cityscapes"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "root",
        type=Path,
        nargs="?",
        default=default,
        help="folder with leftImg8bit and gtFine (default: CITYSCAPES_DATASET, or else cityscapes "
        f"in DETECTRON2_DATASETS, now {default})",
    )
    parser.add_argument(
        "--label-train-ids",
        action="store_true",
        help="also make the labelTrainIds PNGs, which Detectron2's own loaders read",
    )
    args = parser.parse_args(arguments)
    for split in SPLITS:
        for what, archive in (
            (f"leftImg8bit/{split}/*/*_leftImg8bit.png", "leftImg8bit_trainvaltest.zip"),
            (f"gtFine/{split}/*/*_gtFine_instanceIds.png", "gtFine_trainvaltest.zip"),
        ):
            if not any(args.root.glob(what)):
                print(
                    f"{parser.prog}: error: no {args.root / what}: unpack {archive} of "
                    f"https://www.cityscapes-dataset.com in {args.root}",
                    file=sys.stderr,
                )
                return 2
    if args.label_train_ids:
        os.environ["CITYSCAPES_DATASET"] = str(args.root)
        createTrainIdLabelImgs.main()
        print()
    convert2panoptic(str(args.root / "gtFine"), setNames=SPLITS)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
