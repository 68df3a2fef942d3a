#!/usr/bin/env python
r"""Write a trained model as one graph, from the pixels of an image to its segments, and check it.

    python tools/export_model.py --config-file configs/quickstart.yaml --output out \
        --check datasets/shapes/val MODEL.WEIGHTS output/quickstart/model_final.pth

Writes DIR/model.onnx (or model.ts). Then images go through PyTorch and through what was written:
those of --check, else some of the dataset, and noise of five sizes. Labels must be equal on 99.9 %
of the pixels of an image, segments the same, boxes equal to 0.01 pixels, scores to 0.0001.

docs/DEPLOYMENT.md says how to use the file.

Exit status: 0 written and checked, 1 written but it disagrees, 2 a mistake.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.command_line import Parser
from panoptic_fpn_ext.data.mapper import read_image
from panoptic_fpn_ext.engine import setup_trained, trained_model
from panoptic_fpn_ext.export import OnnxModel, export_onnx
from panoptic_fpn_ext.export.agreement import Agreement, compared, outputs_of
from panoptic_fpn_ext.export.onnx_file import OPSETS, needed
from panoptic_fpn_ext.export.torchscript import TorchScriptModel, export_torchscript

FILES = {"onnx": "model.onnx", "torchscript": "model.ts"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
NOISE = ((1, 97), (8, 8), (90, 400), (480, 640), (130, 1))
OF_DATASET = 5  # images, without --check


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        return export(parse(arguments))
    except UserError as error:
        print(f"export_model.py: error: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="export_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--format", choices=FILES, default="onnx", help="default: onnx")
    parser.add_argument("--opset", type=int, default=OPSETS[0], help=f"default: {OPSETS[0]}")
    parser.add_argument("--check", type=Path, metavar="IMAGES", help="an image or a folder of some")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(arguments)


def export(args: argparse.Namespace) -> int:
    """Write the model and check it; the exit status."""
    if args.format == "onnx":
        needed("onnx"), needed("onnxruntime")
    cfg = setup_trained(args.config_file, args.opts)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ACCELERATION.PRECISION = "float32"
    images = list(images_to_check(cfg, args.check))
    make_folder(args.output)
    model = trained_model(cfg)
    file = args.output / FILES[args.format]
    if args.format == "onnx":
        export_onnx(cfg, model, file, opset=args.opset)
        exported = OnnxModel(file, threads=torch.get_num_threads())
    else:
        export_torchscript(cfg, model, file)
        exported = TorchScriptModel(file)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, outputs {', '.join(exported.output_names)}")
    return 0 if agrees(cfg, model, exported, images) else 1


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: may not be written to; choose another")


def images_to_check(cfg: CfgNode, path: Path | None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and pixels (H, W, 3) uint8 in the format of the config."""
    if path is None:
        files = images_of_dataset(cfg)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"--check {path}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"--check {path}: no such file or folder")
    for file in files:
        yield str(file), read_image({"file_name": str(file)}, cfg.INPUT.FORMAT)
    random = np.random.default_rng(0)
    for height, width in NOISE:
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield f"noise {height}x{width}", noise


def images_of_dataset(cfg: CfgNode) -> list[str]:
    for name in cfg.DATASETS.TEST:
        try:
            return [record["file_name"] for record in DatasetCatalog.get(name)[:OF_DATASET]]
        except (UserError, OSError, KeyError):  # it is not on this machine
            continue
    return []


def agrees(
    cfg: CfgNode,
    model: torch.nn.Module,
    exported: OnnxModel | TorchScriptModel,
    images: Sequence[tuple[str, np.ndarray]],
) -> bool:
    """Whether both say the same of all images; prints how well, and how fast they are."""
    resize = T.ResizeShortestEdge(
        [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST, sample_style="choice"
    )
    found: list[Agreement] = []
    seconds: dict[str, list[float]] = {"PyTorch": [], "exported": []}
    for name, pixels in images:
        start = time.perf_counter()
        inputs = {"height": pixels.shape[0], "width": pixels.shape[1]}
        transformed = resize.get_transform(pixels).apply_image(pixels)
        inputs["image"] = torch.as_tensor(np.ascontiguousarray(transformed.transpose(2, 0, 1)))
        expected = outputs_of(model, inputs)
        middle = time.perf_counter()
        outputs = exported(np.ascontiguousarray(pixels))
        if name.startswith("noise"):
            pass
        else:
            seconds["PyTorch"].append(middle - start)
            seconds["exported"].append(time.perf_counter() - middle)
        agreement = compared(expected, outputs)
        found.append(agreement)
        if not agreement.is_good:
            print(f"{name}: {', '.join(agreement.faults)}", file=sys.stderr)
    good = sum(agreement.is_good for agreement in found)
    counts = [agreement.instances for agreement in found]
    print(f"{good} of {len(found)} images agree, with {min(counts)} to {max(counts)} instances")
    print(
        f"  labels equal on {min(a.labels for a in found):.4%} of the pixels of an image at least, "
        f"{np.mean([a.labels for a in found]):.5%} in the mean\n"
        f"  boxes differ by {max(a.box for a in found):.1e} pixels at most, scores by "
        f"{max(a.score for a in found):.1e}"
    )
    for name, times in seconds.items():
        if times:
            lower, median, upper = np.quantile([1000 * t for t in times], (0.25, 0.5, 0.75))
            print(f"  {name}: {median:.1f} ms an image ({lower:.1f}-{upper:.1f})")
    return good == len(found)


if __name__ == "__main__":
    sys.exit(main())
