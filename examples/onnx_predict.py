#!/usr/bin/env python
r"""Panoptic maps of images by an exported model; needs numpy, onnxruntime and Pillow alone.

    python examples/onnx_predict.py out/model.onnx IMAGES --output predictions

Writes into the folder --output, for the images in the folder IMAGES (or one image): a picture of
the segments over each (overlays/), and the maps in the COCO panoptic format
(https://cocodataset.org/#format-results): panoptic.json and panoptic/NAME.png.

Exit status: 0 all written, 2 a mistake.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
OPACITY = 0.6


class Mistake(Exception):
    """One line that says what is wrong, and what to do."""


class Model:
    """An exported model: pixels in, a panoptic map and its segments out."""

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        """
        Args:
            file: what tools/export_model.py has written.
            threads: of an image; 0 for one on each core.

        Raises:
            Mistake: not such a file, or one without panoptic maps.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=onnxruntime.get_available_providers()
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise Mistake(f"{file}: ONNX Runtime cannot load it: {reason}") from error
        facts = self.session.get_modelmeta().custom_metadata_map
        self.outputs = [output.name for output in self.session.get_outputs()]
        if "semantic_classes" not in facts or "panoptic_seg" not in self.outputs:
            raise Mistake(f"{file}: not a model of tools/export_model.py with panoptic maps")
        self.is_bgr = facts["input_format"] == "BGR"
        self.classes = {
            True: json.loads(facts["thing_classes"]),
            False: json.loads(facts["semantic_classes"]),
        }
        optional = self.session.get_overridable_initializers()
        self.thresholds = [value.name for value in optional]

    def __call__(
        self, rgb: np.ndarray, **thresholds: float
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """
        Args:
            rgb: (H, W, 3) uint8.
            thresholds: some of ``self.thresholds`` in place of the model's own.

        Returns:
            (H, W) int32 ids of segments, 0 where there is none; and the segments: ``id``,
            ``category_id``, ``isthing``, ``score``, ``area``, ``instance_id``.
        """
        image = np.ascontiguousarray(rgb[:, :, ::-1]) if self.is_bgr else rgb
        inputs = {name: np.array([value], np.float64) for name, value in thresholds.items()}
        found = self.session.run(None, {"image": image, **inputs})
        by_name = dict(zip(self.outputs, found, strict=True))
        keys = ("id", "category_id", "isthing", "score", "area", "instance_id")
        columns = [by_name[f"segment_{key}"].tolist() for key in keys]
        segments = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
        return by_name["panoptic_seg"], segments

    def category(self, segment: dict[str, Any]) -> dict[str, Any]:
        """``id`` in the dataset, ``name`` and ``color`` of the class of a segment."""
        classes = self.classes[segment["isthing"]]
        number = segment["category_id"]
        if number < len(classes):
            return classes[number]
        return {"id": number, "name": str(number), "color": [128, 128, 128]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="onnx_predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all cores")
    args = parser.parse_args(arguments)
    try:
        number = predict(args)
    except Mistake as mistake:
        print(f"onnx_predict.py: error: {mistake}", file=sys.stderr)
        return 2
    print(f"{number} images: {args.output}/overlays, panoptic.json, panoptic")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Write all; how many images there are."""
    model = Model(args.model, threads=args.threads)
    annotations = []
    try:
        for name in ("overlays", "panoptic"):
            (args.output / name).mkdir(parents=True, exist_ok=True)
        for number, (path, rgb) in enumerate(images_at(args.images), 1):
            ids, segments = model(rgb)
            name = path.with_suffix(".png").as_posix().replace("/", "_")
            Image.fromarray(id_colors(ids)).save(args.output / "panoptic" / name)
            overlay(model, rgb, ids, segments).save(args.output / "overlays" / name)
            annotations.append(
                {
                    "image_id": int(path.stem) if path.stem.isdecimal() else number,
                    "file_name": name,
                    "segments_info": [
                        {
                            "id": s["id"],
                            "category_id": model.category(s)["id"],
                            "area": s["area"],
                            "score": round(s["score"], 6),
                        }
                        for s in segments
                    ],
                }
            )
        (args.output / "panoptic.json").write_text(json.dumps({"annotations": annotations}))
    except OSError as error:
        raise Mistake(f"{error.filename or args.output}: {error.strerror or error}") from error
    return len(annotations)


def images_at(path: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Paths, below the folder if it is one, and pixels (H, W, 3) uint8, RGB, upright."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    else:
        files = [path]
    if not files:
        raise Mistake(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:
            raise Mistake(f"{file}: cannot read the image: {error}") from error
        yield file.relative_to(path) if path.is_dir() else Path(file.name), pixels


def id_colors(ids: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: R + 256 G + 65536 B is the id."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def overlay(
    model: Model, rgb: np.ndarray, ids: np.ndarray, segments: list[dict[str, Any]]
) -> Image.Image:
    """The segments over the image, in the colours of their classes; things a little varied."""
    colors = np.zeros((max([0, *(s["id"] for s in segments)]) + 1, 3))
    random = np.random.default_rng(0)
    for segment in segments:
        varied = random.uniform(-40, 40, 3) if segment["isthing"] else 0
        colors[segment["id"]] = np.clip(np.array(model.category(segment)["color"]) + varied, 0, 255)
    drawn = np.where(ids[..., None] > 0, rgb * (1 - OPACITY) + colors[ids] * OPACITY, rgb)
    edge = np.zeros(ids.shape, bool)
    edge[1:] |= ids[1:] != ids[:-1]
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    drawn[edge] = 255
    return Image.fromarray(drawn.astype(np.uint8))


if __name__ == "__main__":
    sys.exit(main())
