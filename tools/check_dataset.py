#!/usr/bin/env python
"""Read a whole panoptic dataset and report every fault, with file and id.

    python tools/check_dataset.py shapes_val
    python tools/check_dataset.py --image-root my/images --panoptic-root my/panoptic \
        --panoptic-json my/panoptic.json

Exit status: 0 without a fault, 1 with faults, 2 where it could not begin.
"""

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.checks import Report, Statistics, check_panoptic_dataset

FOLDERS = ("image_root", "panoptic_root")
FILES = ("panoptic_json", "instances_json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a registered dataset; or give its paths:")
    parser.add_argument("--image-root", help="folder of the images")
    parser.add_argument("--panoptic-root", help="folder of the panoptic PNGs")
    parser.add_argument("--panoptic-json")
    parser.add_argument("--instances-json", help="COCO instances of the same images, if any")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: only this one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    args = parser.parse_args()
    paths = _paths(args)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 or more")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder")

    report = check_panoptic_dataset(**paths, workers=args.workers, progress=sys.stderr.isatty())
    for fault in report.faults:
        print(fault)
    print(_summary(report))
    if args.json:
        content = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
        args.json.write_text(content + "\n", encoding="utf-8")
    return 1 if report.faults else 0


def _paths(args: argparse.Namespace) -> dict[str, Any]:
    """Where the dataset is, from its name or from the arguments; all of it exists."""
    given = {name: getattr(args, name) for name in (*FOLDERS, *FILES) if getattr(args, name)}
    if args.name and given:
        raise UserError("give the name of a registered dataset or its paths, not both")
    if args.name:
        if args.name not in DatasetCatalog.list():
            close = difflib.get_close_matches(args.name, DatasetCatalog.list(), n=1)
            hint = f"did you mean {close[0]}?" if close else "give its paths instead"
            raise UserError(f"no dataset {args.name!r} is registered; {hint}")
        metadata = MetadataCatalog.get(args.name).as_dict()
        names = {"instances_json": "json_file"}
        given = {
            name: metadata[names.get(name, name)]
            for name in (*FOLDERS, *FILES, "image_file_name")
            if metadata.get(names.get(name, name))
        }
    for name in (*FOLDERS, "panoptic_json"):
        if name not in given:
            raise UserError(
                f"{args.name} is no panoptic dataset of panoptic_fpn_ext: it has no {name}"
                if args.name
                else "needed are a dataset's name, or --image-root, --panoptic-root and "
                "--panoptic-json"
            )
    for name in (*FOLDERS, *FILES):
        path = given.get(name)
        if path and not (os.path.isdir(path) if name in FOLDERS else os.path.isfile(path)):
            kind = "folder" if name in FOLDERS else "file"
            raise UserError(f"{path}: no such {kind} ({name}); see datasets/README.md")
    return given


def _summary(report: Report) -> str:
    statistics: Statistics = report.statistics
    rows = [
        (
            name,
            statistics.segments[name],
            statistics.crowds[name],
            100 * pixels / statistics.pixels,
        )
        for name, pixels in statistics.category_pixels.most_common()
    ]
    table = tabulate(rows, ("category", "segments", "crowds", "% of pixels"), "pipe", ".2f")
    pixels = max(1, statistics.pixels)
    return (
        f"\n{table}\n\n{statistics.images} images, {sum(statistics.segments.values())} segments, "
        f"{sum(statistics.crowds.values())} crowds; "
        f"{100 * statistics.void_pixels / pixels:.2f}% of the pixels are void, "
        f"{100 * statistics.crowd_pixels / pixels:.2f}% crowd\n"
        f"{len(report.faults)} faults"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"check_dataset.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
