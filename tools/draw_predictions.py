#!/usr/bin/env python
"""Draw panoptic predictions beside the ground truth of a registered dataset, into one PNG.

    python tools/draw_predictions.py --config-file configs/quickstart.yaml \
        --output predictions.png MODEL.WEIGHTS output/quickstart/model_final.pth
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.engine import setup

GAP = 8  # white pixels between pictures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    parser.add_argument("--dataset", help="default: the first of DATASETS.TEST")
    parser.add_argument("--num-images", type=int, default=6)
    parser.add_argument("--columns", type=int, default=2, help="images in a row")
    parser.add_argument("--height", type=int, default=320, help="of each picture, in pixels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    args.eval_only, args.resume = True, False

    cfg = setup(args)
    name = args.dataset or cfg.DATASETS.TEST[0]
    predictor = DefaultPredictor(cfg)
    rows = []
    records = DatasetCatalog.get(name)[: args.num_images]
    for first in range(0, len(records), args.columns):
        row = [
            draw(record, predictor, name, args.height) for record in records[first:][: args.columns]
        ]
        rows.append(side_by_side([picture for pair in row for picture in pair]))
    width = max(row.shape[1] for row in rows)
    rows = [pad(row, row.shape[0] + GAP, width) for row in rows]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(args.output), np.concatenate(rows))
    print(f"{len(records)} images, prediction left and ground truth right: {args.output}")


def draw(
    record: dict, predictor: DefaultPredictor, dataset_name: str, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and ground truth of one image, drawn on it: two (H, W, 3) BGR pictures."""
    image = cv2.imread(record["file_name"])
    truth = torch.from_numpy(read_panoptic_png(record["pan_seg_file_name"]).astype(np.int32))
    drawings = []
    for panoptic_seg, segments_info in (
        predictor(image)["panoptic_seg"],
        (truth, record["segments_info"]),
    ):
        visualizer = Visualizer(
            image[:, :, ::-1], MetadataCatalog.get(dataset_name), scale=height / image.shape[0]
        )
        drawing = visualizer.draw_panoptic_seg(panoptic_seg.cpu(), segments_info)
        drawings.append(drawing.get_image()[:, :, ::-1])
    return drawings[0], drawings[1]


def side_by_side(pictures: list[np.ndarray]) -> np.ndarray:
    height = max(picture.shape[0] for picture in pictures)
    return np.concatenate([pad(p, height, p.shape[1] + GAP) for p in pictures], axis=1)


def pad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """White below and to the right."""
    missing = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, missing, constant_values=255)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"draw_predictions.py: error: {error}", file=sys.stderr)
        sys.exit(2)
