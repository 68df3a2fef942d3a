"""Predictions for images that are in no dataset: many at once, and as files."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from torch import nn

from .config import resolve_config
from .data.mapper import read_image
from .errors import UserError
from .evaluation.instance_ap import InstanceAPEvaluator, coco_results
from .evaluation.submission import PanopticSubmissionWriter

Picture = str | os.PathLike | np.ndarray | torch.Tensor


class Predictor:
    """A trained model that takes images as they come: paths, arrays and tensors.

    Images that have one size go through the model together; so each has the results that it has
    alone, up to rounding. Detectron2's ``DefaultPredictor`` takes one image at a time.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        min_size: int,
        max_size: int,
        input_format: str = "BGR",
        metadata: Metadata | None = None,
        batch_size: int = 8,
    ) -> None:
        """
        Args:
            model: one of Detectron2's or of this package; it is put into inference.
            min_size, max_size: of the shorter and of the longer side of what the model is given; a
                ``min_size`` of 0 leaves images as they are.
            input_format: order of the channels that the model wants, ``"BGR"`` or ``"RGB"``.
            metadata: of a dataset with the model's classes, for the files of results.
            batch_size: how many images are in memory at once.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        if input_format not in ("BGR", "RGB"):
            raise UserError(f"INPUT.FORMAT {input_format}: a Predictor has BGR and RGB")
        self.model = model.eval()
        self.input_format = input_format
        self.metadata = metadata
        self.batch_size = batch_size
        self._resize = T.ResizeShortestEdge([min_size, min_size], max_size)

    @classmethod
    def from_config(cls, cfg: CfgNode, *, batch_size: int = 8) -> dict[str, Any]:
        """
        Args:
            cfg: of a trained model; ``MODEL.WEIGHTS`` are loaded.
            batch_size: see :meth:`__init__`.
        """
        from .engine import trained_model  # late: what trains comes after all this

        cfg = resolve_config(cfg)
        names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
        return {
            "model": trained_model(cfg),
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "input_format": cfg.INPUT.FORMAT,
            "metadata": MetadataCatalog.get(names[0]) if names else None,
            "batch_size": batch_size,
        }

    def __call__(self, images: Iterable[Picture]) -> Iterator[dict[str, Any]]:
        """
        Args:
            images: paths; arrays (H, W, 3) uint8, BGR as OpenCV reads them and ``DefaultPredictor``
                takes them; tensors (3, H, W) uint8, RGB as torchvision reads them.

        Yields:
            For each image, in order: the model's outputs, with ``image_id`` (its number from 1, or
            that in the name of its file), ``file_name``, ``height`` and ``width``.

        Raises:
            UserError: a file that is missing or no image; another array or tensor.
        """
        if isinstance(images, (str, os.PathLike)):
            images = [images]
        records = (self._record(image, number) for number, image in enumerate(images, 1))
        while batch := list(islice(records, self.batch_size)):
            by_size: dict[torch.Size, list[int]] = {}
            for place, record in enumerate(batch):
                by_size.setdefault(record["image"].shape, []).append(place)
            results: list[dict[str, Any]] = [{}] * len(batch)
            for places in by_size.values():
                with torch.no_grad():
                    outputs = self.model([batch[place] for place in places])
                for place, output in zip(places, outputs, strict=True):
                    known = {k: v for k, v in batch[place].items() if k != "image"}
                    results[place] = {**known, **output}
            yield from results

    def _record(self, image: Picture, number: int) -> dict[str, Any]:
        """What the model takes."""
        name, image_id = f"{number:012d}", number
        if isinstance(image, (str, os.PathLike)):
            name = os.fspath(image)
            stem = Path(name).stem
            image_id = int(stem) if stem.isdecimal() else number
            pixels = read_image({"file_name": name}, self.input_format)
        else:
            pixels, order = image, "BGR"
            if isinstance(image, torch.Tensor):
                pixels, order = image.cpu().numpy(), "RGB"
                pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
                raise UserError(_WANTED.format(number, _kind(image)))
            if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
                raise UserError(_WANTED.format(number, _kind(image)))
            if order != self.input_format:
                pixels = pixels[:, :, ::-1]
        height, width = pixels.shape[:2]
        transform = self._resize.get_transform(pixels)
        if isinstance(transform, T.ResizeTransform):  # of long lines nothing may be left
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        resized = transform.apply_image(np.ascontiguousarray(pixels))
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {
            "image": tensor,
            "height": height,
            "width": width,
            "file_name": name,
            "image_id": image_id,
        }


_WANTED = (
    "image {}: {}; expected a path, a uint8 array (H, W, 3), BGR, or a uint8 tensor (3, H, W), RGB"
)


def _kind(image: Any) -> str:
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return f"{type(image).__name__} of {image.dtype}, {tuple(image.shape)}"
    return type(image).__name__


def write_panoptic_results(
    results: Iterable[Mapping[str, Any]], folder: str | os.PathLike, metadata: Metadata
) -> int:
    """Write panoptic maps in the COCO format: ``panoptic.json`` and ``panoptic/<name>.png``.

    Args:
        results: of :class:`Predictor`, or dicts with ``file_name``, ``image_id`` and
            ``panoptic_seg``. They are taken one by one.
        folder: where to write; made if it is not there.
        metadata: of a dataset with the classes of the results; its category ids are written.

    Returns:
        How many images there were.

    Raises:
        UserError: a result without a panoptic map; two images of one name; a folder that cannot
            be written.
    """
    folder = Path(folder)
    writer = PanopticSubmissionWriter(
        zip_file=folder.with_name(folder.name + ".zip"),
        name="panoptic",
        image_root=folder / "panoptic",  # so that files are named as images are, without folders
        thing_category_ids=list(metadata.thing_dataset_id_to_contiguous_id),
        stuff_category_ids=list(metadata.stuff_dataset_id_to_contiguous_id),
        distributed=False,
    )
    entries: dict[str, dict[str, Any]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for result in results:
            name = Path(result["file_name"]).stem
            if name in entries:
                raise UserError(f"{folder}: two images are called {name}, and so would their PNGs")
            prediction = _output(result, "panoptic_seg")
            entries[name] = writer.evaluate_image(result, prediction, result["file_name"])
        content = json.dumps({"annotations": list(entries.values())})
        (folder / "panoptic.json").write_text(content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return len(entries)


def write_instance_results(
    results: Iterable[Mapping[str, Any]], file: str | os.PathLike, metadata: Metadata
) -> int:
    """Write instances in the COCO result format, as ``instances_results.json``.

    Args:
        results: of :class:`Predictor`, or dicts with ``image_id``, ``height``, ``width`` and
            ``instances``. They are taken one by one.
        file: what to write, whole or not at all.
        metadata: see :func:`write_panoptic_results`.

    Returns:
        How many instances there were.

    Raises:
        UserError: a result without instances; a file that cannot be written.
    """
    file, number = Path(file), 0
    places = metadata.thing_dataset_id_to_contiguous_id
    ids = {place: category for category, place in places.items()}
    # With a file of annotations it does not look for those of an image.
    evaluator = InstanceAPEvaluator(
        thing_classes=metadata.thing_classes,
        json_file=os.devnull,
        dataset_id_to_contiguous_id=places,
        distributed=False,
    )
    partial = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(b"[")
            for result in results:
                instances = _output(result, "instances")
                image = evaluator.evaluate_image(result, instances, str(result.get("file_name")))
                for entry in coco_results(result["image_id"], image, ids):
                    stream.write((b",\n" if number else b"") + msgspec.json.encode(entry))
                    number += 1
            stream.write(b"]")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return number


def _output(result: Mapping[str, Any], name: str) -> Any:
    if name not in result:
        raise UserError(
            f"the result for {result.get('file_name')} has no {name}: add it to "
            "MODEL.PANOPTIC_FPN.OUTPUTS"
        )
    return result[name]
