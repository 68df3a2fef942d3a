"""A panoptic dataset small enough to break in every way."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from panoptic_fpn_ext import register_panoptic_dataset
from panoptic_fpn_ext.data.panoptic_png import write_panoptic_png
from panoptic_fpn_ext.data.targets import segment_boxes

CATEGORIES = [
    {"id": 3, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
    {"id": 7, "name": "car", "isthing": 1, "color": [0, 0, 142]},
    {"id": 9, "name": "person", "isthing": 1},
]
SIZE = (24, 32)
SKY, CAR, PERSON, CROWD = 5, 300, 70_000, 80


class TinyDataset:
    """Images 1, 2, ...: sky above, void below, a car, a person and a crowd of cars.

    ``panoptic`` and ``instances`` are the contents of the JSONs; ``write`` writes them.
    """

    def __init__(self, root: Path, num_images: int = 2) -> None:
        self.root = root
        self.images, self.pngs = root / "images", root / "panoptic"
        self.panoptic_json, self.instances_json = root / "panoptic.json", root / "instances.json"
        for folder in (self.images, self.pngs):
            folder.mkdir(parents=True)
        self.panoptic = {"images": [], "annotations": [], "categories": CATEGORIES}
        for image_id in range(1, num_images + 1):
            self._add(image_id)
        instances = [
            {
                "id": place,
                "image_id": annotation["image_id"],
                "category_id": segment["category_id"],
                "bbox": segment["bbox"],
                "area": segment["area"],
                "iscrowd": 0,
                "segmentation": [_rectangle(*segment["bbox"])],
            }
            for place, (annotation, segment) in enumerate(
                (annotation, segment)
                for annotation in self.panoptic["annotations"]
                for segment in annotation["segments_info"]
                if segment["category_id"] != 3 and not segment["iscrowd"]
            )
        ]
        self.instances = {**self.panoptic, "annotations": instances}
        self.write()

    def _add(self, image_id: int) -> None:
        ids = np.zeros(SIZE, int)
        ids[:16] = SKY
        ids[4:12, 2:10] = CAR
        ids[6:14, 12:17] = PERSON
        ids[2:8, 20:30] = CROWD
        values, _, boxes = segment_boxes(ids)
        boxes = dict(zip(values.tolist(), boxes.tolist(), strict=True))
        segments = [
            {
                "id": i,
                "category_id": category,
                "iscrowd": int(i == CROWD),
                "area": int((ids == i).sum()),
                "bbox": [x0 := boxes[i][0], y0 := boxes[i][1], boxes[i][2] - x0, boxes[i][3] - y0],
            }
            for i, category in ((SKY, 3), (CAR, 7), (PERSON, 9), (CROWD, 7))
        ]
        write_panoptic_png(self.pngs / f"{image_id}.png", ids)
        noise = np.random.default_rng(image_id).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        cv2.imwrite(str(self.images / f"{image_id}.jpg"), noise)
        height, width = SIZE
        self.panoptic["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
        )
        self.panoptic["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments}
        )

    def image(self, image_id: int) -> dict[str, Any]:
        return self.panoptic["images"][image_id - 1]

    def annotation(self, image_id: int) -> dict[str, Any]:
        return self.panoptic["annotations"][image_id - 1]

    def segment(self, image_id: int, segment_id: int) -> dict[str, Any]:
        segments = self.annotation(image_id)["segments_info"]
        return next(s for s in segments if s["id"] == segment_id)

    def png(self, image_id: int) -> Path:
        return self.pngs / f"{image_id}.png"

    def write(self) -> None:
        self.panoptic_json.write_text(json.dumps(self.panoptic))
        self.instances_json.write_text(json.dumps(self.instances))

    def paths(self, instances: bool = False) -> dict[str, Path]:
        """The arguments of ``register_panoptic_dataset`` that say where everything is."""
        return {
            "image_root": self.images,
            "panoptic_root": self.pngs,
            "panoptic_json": self.panoptic_json,
            **({"instances_json": self.instances_json} if instances else {}),
        }

    @contextmanager
    def registered(self, instances: bool = False, **arguments: Any) -> Iterator[str]:
        """The dataset, registered for the time being; its name."""
        name = "tiny"
        register_panoptic_dataset(name, **self.paths(instances), **arguments)
        try:
            yield name
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _rectangle(x: int, y: int, w: int, h: int) -> list[int]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]
