#!/usr/bin/env python
r"""Draw images of a dataset, what a network predicts for them, and the ground truth, side by side.

    python tools/draw_predictions.py --config-file configs/quickstart.yaml \
        --output predictions.png MODEL.WEIGHTS output/quickstart/model_final.pth

A predicted segment that matches a true one (IoU above 0.5, the same category) has its colour.
Images without annotations are drawn without ground truth.

Exit status: 0 the picture is written, 2 it is not, because of a mistake.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, ImageDraw
from tqdm import tqdm

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.command_line import Parser, whole_file
from panoptic_fpn_ext.data import PanopticFPNMapper
from panoptic_fpn_ext.engine import setup_prediction, trained_model
from panoptic_fpn_ext.evaluation.pictures import GAP, pictures
from panoptic_fpn_ext.visualization import font

FORMATS = (".png", ".jpg", ".jpeg")
HEADINGS = ("image", "prediction", "ground truth")
WIDE_GAP = 24  # white pixels between images in a row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        args = parse(arguments)
        with whole_file(args.output) as unfinished:
            number = draw(args, unfinished)
    except UserError as error:
        print(f"draw_predictions.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndraw_predictions.py: interrupted; nothing is written", file=sys.stderr)
        return 130
    print(f"{number} image{'s' if number > 1 else ''}, drawn to {args.output}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="draw_predictions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = " or ".join(FORMATS)
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=f"what to write, {formats}"
    )
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--num-images",
        type=between(1, 10_000),
        default=6,
        metavar="N",
        help="the first N (default: 6)",
    )
    chosen.add_argument("--image-ids", metavar="ID,ID", help="these in place of the first")
    parser.add_argument(
        "--columns",
        type=between(1, 100),
        default=2,
        metavar="N",
        help="images in a row (default: 2)",
    )
    parser.add_argument(
        "--height",
        type=between(16, 2000),
        default=200,
        metavar="PIXELS",
        help="of each picture (default: 200)",
    )
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="config keys; MODEL.WEIGHTS FILE is the checkpoint",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {args.output}: its name should end in {formats}")
    return args


def between(lowest: int, highest: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers within limits."""

    def number(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"expected {lowest} to {highest}, got {text!r}")
        return int(text)

    return number


def draw(args: argparse.Namespace, file: Path) -> int:
    """Write the picture; how many images it shows."""
    cfg = setup_prediction(args.config_file, args.opts, dataset=args.dataset)
    cfg.defrost()
    cfg.MODEL.PANOPTIC_FPN.OUTPUTS = ["panoptic_seg"]
    name = cfg.DATASETS.TEST[0]
    records = chosen_records(name, args)
    model = trained_model(cfg)
    mapper = PanopticFPNMapper(cfg, is_train=False)
    examples = []
    for record in tqdm(records, unit="image", dynamic_ncols=True, disable=len(records) < 20):
        with torch.no_grad():
            (output,) = model([mapper(record)])
        maps = [output["panoptic_seg"]]
        examples.append(pictures(record, maps, MetadataCatalog.get(name), args.height))
    try:
        sheet(examples, args.columns).save(file, quality=90)
    except (OSError, ValueError) as error:  # the disk is full, or a format has its limits
        raise UserError(f"--output {args.output}: cannot be written: {error}") from error
    return len(examples)


def chosen_records(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    records = DatasetCatalog.get(name)
    if not records:
        raise UserError(f"--dataset {name}: it has no images")
    if args.image_ids is None:
        return records[: args.num_images]
    by_id = {str(record["image_id"]): record for record in records}
    wanted = args.image_ids.split(",")
    for image_id in wanted:
        if image_id not in by_id:
            raise UserError(
                f"--image-ids {args.image_ids}: {name} has no image {image_id!r}; ids are "
                f"{', '.join([*by_id][:3])}{', ...' if len(by_id) > 3 else ''}"
            )
    return [by_id[image_id] for image_id in wanted]


def sheet(examples: Sequence[Sequence[np.ndarray]], columns: int) -> Image.Image:
    """Pictures of one height in rows, those of ``columns`` images in each, under headings."""
    number, columns = max(map(len, examples)), min(columns, len(examples))
    rows = [
        [picture for example in examples[k : k + columns] for picture in example]
        for k in range(0, len(examples), columns)
    ]
    height = rows[0][0].shape[0]
    headings, letters = HEADINGS[:number] * columns, font(min(max(height // 16, 12), 32))
    widths = [
        max([math.ceil(letters.getlength(heading)), *(row[k].shape[1] for row in rows if row[k:])])
        for k, heading in enumerate(headings)
    ]
    gaps = [GAP if k % number else WIDE_GAP for k in range(1, len(widths))]
    lefts = [0, *accumulate(map(sum, zip(widths, gaps, strict=False)))]
    top = sum(letters.getmetrics()) + GAP
    page = Image.new("RGB", (lefts[-1] + widths[-1], top + len(rows) * (height + GAP)), "white")
    text = ImageDraw.Draw(page)
    for left, width, heading in zip(lefts, widths, headings, strict=True):
        text.text((left + width / 2, 0), heading, fill="black", font=letters, anchor="ma")
    for k, row in enumerate(rows):
        for left, width, picture in zip(lefts, widths, row, strict=False):
            place = left + (width - picture.shape[1]) // 2, top + k * (height + GAP)
            page.paste(Image.fromarray(picture), place)
    return page


if __name__ == "__main__":
    sys.exit(main())
