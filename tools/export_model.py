#!/usr/bin/env python
r"""Write a trained model as one graph, from the pixels of an image to its segments, and check it.

    python tools/export_model.py --config-file configs/quickstart.yaml --output out \
        --check datasets/shapes/val MODEL.WEIGHTS output/quickstart/model_final.pth

Writes DIR/model.onnx (or model.ts). Then images go through PyTorch and through what was written:
those of --check, else some of the dataset, and noise of five sizes. Labels must be equal on 99.9 %
of the pixels of an image, segments the same, boxes equal to 0.01 pixels, scores to 0.0001. With
--int8 it is the category that must be equal, on 97 % of the pixels of all images but noise. For
the name of a dataset as --check, PQ of both is printed, too.

docs/DEPLOYMENT.md says how to use the file.

Exit status: 0 written and checked, 1 written but it disagrees, 2 a mistake.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from tqdm import tqdm

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.command_line import Parser
from panoptic_fpn_ext.data.image_files import SUFFIXES, read_image
from panoptic_fpn_ext.engine import setup_trained, trained_model
from panoptic_fpn_ext.evaluation import PanopticQualityEvaluator
from panoptic_fpn_ext.export import OnnxModel, export_onnx
from panoptic_fpn_ext.export.agreement import Agreement, compared, outputs_of
from panoptic_fpn_ext.export.int8 import to_int8
from panoptic_fpn_ext.export.onnx_file import OPSETS, needed
from panoptic_fpn_ext.export.torchscript import TorchScriptModel, export_torchscript

CALIBRATION = 50  # images of --int8 that are used
MIN_CATEGORIES = 0.97  # share of pixels, with --int8
FILES = {"onnx": "model.onnx", "torchscript": "model.ts"}
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
    parser.add_argument(
        "--int8", metavar="IMAGES", help="round to 8 bits; ranges are those of such images"
    )
    parser.add_argument(
        "--check", metavar="IMAGES", help="an image, a folder of some, or a dataset's name"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(arguments)


def export(args: argparse.Namespace) -> int:
    """Write the model and check it; the exit status."""
    if args.format == "onnx":
        needed("onnx"), needed("onnxruntime")
    elif args.int8:
        raise UserError("--int8 is for --format onnx")
    cfg = setup_trained(args.config_file, args.opts)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ACCELERATION.PRECISION = "float32"
    images = [*images_to_check(cfg, args.check), *noise()]
    calibration = images_of(args.int8, "--int8") if args.int8 else []
    make_folder(args.output)
    model = trained_model(cfg)
    file = args.output / FILES[args.format]
    if args.format == "onnx":
        export_onnx(cfg, model, file, opset=args.opset)
        if args.int8:
            chosen = calibration[:: -(-len(calibration) // CALIBRATION)]
            to_int8(file, (pixels_of(cfg, {"file_name": name}) for name in chosen))
        exported = OnnxModel(file, threads=torch.get_num_threads())
    else:
        export_torchscript(cfg, model, file)
        exported = TorchScriptModel(file)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, outputs {', '.join(exported.output_names)}")
    dataset = args.check if args.check in DatasetCatalog.list() else None
    is_exact = not args.int8
    return 0 if agrees(cfg, model, exported, images, is_exact, dataset) else 1


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: may not be written to; choose another")


def images_to_check(cfg: CfgNode, chosen: str | None) -> list[dict[str, Any]]:
    """Dataset dicts, or such that have a ``file_name`` alone."""
    if chosen in DatasetCatalog.list():
        return DatasetCatalog.get(chosen)
    if chosen is not None:
        return [{"file_name": name} for name in images_of(chosen, "--check")]
    for name in cfg.DATASETS.TEST:
        try:
            return DatasetCatalog.get(name)[:OF_DATASET]
        except (UserError, OSError, KeyError):  # it is not on this machine
            continue
    return []


def images_of(name: str, option: str) -> list[str]:
    """Files: an image, or those in a folder."""
    path = Path(name)
    if path.is_file():
        return [name]
    if not path.is_dir():
        raise UserError(f"{option} {name}: no such file or folder")
    files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{option} {name}: no images in it ({', '.join(SUFFIXES)})")
    return files


def noise() -> list[dict[str, Any]]:
    """As :func:`images_to_check`, with ``pixels`` in place of a ``file_name``."""
    random = np.random.default_rng(0)
    return [{"pixels": random.integers(0, 256, (*size, 3), dtype=np.uint8)} for size in NOISE]


def pixels_of(cfg: CfgNode, record: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8 in the format of the config."""
    pixels = record["pixels"] if "pixels" in record else read_image(record, cfg.INPUT.FORMAT)
    return np.ascontiguousarray(pixels)


def agrees(
    cfg: CfgNode,
    model: torch.nn.Module,
    exported: OnnxModel | TorchScriptModel,
    images: Sequence[dict[str, Any]],
    is_exact: bool,
    dataset: str | None,
) -> bool:
    """Whether both say the same; prints how well, and how fast they are.

    Args:
        images: see :func:`images_to_check` and :func:`noise`.
        is_exact: each image must agree, see :class:`~panoptic_fpn_ext.export.agreement.Agreement`;
            else categories must, in the mean of all images but noise.
        dataset: that of the images, to print PQ of both.
    """
    resize = T.ResizeShortestEdge(
        [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST, sample_style="choice"
    )
    found: list[Agreement] = []
    categories: list[float] = []
    seconds: dict[str, list[float]] = {"PyTorch": [], "exported": []}
    quality = {name: evaluator_of(exported, dataset) for name in seconds}
    for record in tqdm(images, desc="check", disable=None):
        pixels = pixels_of(cfg, record)
        start = time.perf_counter()
        inputs = {"height": pixels.shape[0], "width": pixels.shape[1]}
        transformed = resize.get_transform(pixels).apply_image(pixels)
        inputs["image"] = torch.as_tensor(np.ascontiguousarray(transformed.transpose(2, 0, 1)))
        expected = outputs_of(model, inputs)
        middle = time.perf_counter()
        outputs = exported(pixels)
        end = time.perf_counter()
        agreement = compared(expected, outputs)
        found.append(agreement)
        if is_exact and not agreement.is_good:
            name = record.get("file_name", "noise {}x{}".format(*pixels.shape))
            print(f"{name}: {', '.join(agreement.faults)}", file=sys.stderr)
        if "file_name" not in record:
            continue
        categories.append(agreement.categories)
        seconds["PyTorch"].append(middle - start)
        seconds["exported"].append(end - middle)
        for name, answer in (("PyTorch", expected), ("exported", outputs)):
            if quality[name]:
                quality[name].process([record], [{"panoptic_seg": panoptic_of(answer)}])
    if is_exact:
        good = sum(agreement.is_good for agreement in found)
        counts = [agreement.instances for agreement in found]
        print(
            f"{good} of {len(found)} images agree, with {min(counts)} to {max(counts)} instances\n"
            f"  labels equal on {min(a.labels for a in found):.4%} of the pixels of an image at "
            f"least, {np.mean([a.labels for a in found]):.5%} in the mean\n"
            f"  boxes differ by {max(a.box for a in found):.1e} pixels at most, scores by "
            f"{max(a.score for a in found):.1e}"
        )
        agree = good == len(found)
    else:
        share = float(np.mean(categories or [a.categories for a in found]))
        print(
            f"categories equal on {share:.2%} of the pixels, at least {MIN_CATEGORIES:.0%} wanted"
        )
        agree = share >= MIN_CATEGORIES
    for name, times in seconds.items():
        if times:
            lower, median, upper = np.quantile([1000 * t for t in times], (0.25, 0.5, 0.75))
            pq = quality[name].evaluate()["panoptic_seg"]["PQ"] if quality[name] else None
            said = f", PQ {pq:.4f}" if pq is not None else ""
            print(f"  {name}: {median:.1f} ms an image ({lower:.1f}-{upper:.1f}){said}")
    return agree


def evaluator_of(
    exported: OnnxModel | TorchScriptModel, dataset: str | None
) -> PanopticQualityEvaluator | None:
    if dataset is None or "panoptic_seg" not in exported.output_names:
        return None
    arguments = PanopticQualityEvaluator.dataset_arguments(MetadataCatalog.get(dataset))
    evaluator = PanopticQualityEvaluator(**arguments, distributed=False)
    evaluator.reset()
    return evaluator


def panoptic_of(answer: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """``panoptic_seg`` as Detectron2 has it."""
    columns = (answer[f"segment_{name}"] for name in ("id", "category_id", "isthing"))
    return answer["panoptic_seg"], [
        {"id": int(number), "category_id": int(category), "isthing": bool(isthing)}
        for number, category, isthing in zip(*columns, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
