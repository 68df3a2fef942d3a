"""Loading the annotations of a training set: those of a made-up one of COCO's size."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from .frame import MB
from .results import Comparison, Peer, Times

SEGMENTS, INSTANCES, COORDINATES = 11, 7, 46  # of an image, of an image and of a polygon
SIZE = 480, 640

# Each in a process of its own: all that it takes stays with it.
CHILD = """
import json, resource, sys, time
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json
from panoptic_fpn_ext.data import register_panoptic_dataset

who, folder = sys.argv[1:]
register_panoptic_dataset(
    "made_up", image_root=folder, panoptic_root=folder, panoptic_json=f"{folder}/panoptic.json",
    instances_json=f"{folder}/instances.json",
)
start = time.perf_counter()
if who == "ours":
    records = DatasetCatalog.get("made_up")
else:
    records = load_coco_json(f"{folder}/instances.json", folder, "theirs")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = [a for record in records for a in record["annotations"]]
answer = [
    len(records),
    len(found),
    sum(a["category_id"] for a in found),
    round(sum(sum(a["bbox"]) + sum(map(sum, a["segmentation"])) for a in found)),
]
print(json.dumps([seconds, peak, answer]))
"""


def loading(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """Panoptic annotations and instances by ours, the instances alone by Detectron2's
    ``load_coco_json``: seconds, and the peak of the process's memory."""
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), args.data_images)
        turns = [[load(who, folder) for who in ("ours", "detectron2")] for _ in range(args.rounds)]
    ours, detectron2 = zip(*turns, strict=True)
    row = Comparison(
        what="loading; Detectron2: instances alone",
        size=f"{args.data_images} images",
        ours_ms=Times.of([seconds for seconds, _, _ in ours]),
        detectron2_ms=Times.of([seconds for seconds, _, _ in detectron2]),
        same_answer=all(a[2] == b[2] for a, b in turns),
        ours_resident_mb=max(round(peak / MB, 1) for _, peak, _ in ours),
        detectron2_resident_mb=max(round(peak / MB, 1) for _, peak, _ in detectron2),
    )
    return [row], []


def load(who: str, folder: str) -> tuple[float, int, list[int]]:
    """Seconds, bytes, and what tells the records apart."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, who, folder], stdout=subprocess.PIPE, text=True, check=True
    )
    return tuple(json.loads(run.stdout.splitlines()[-1]))


def make_files(folder: Path, num_images: int) -> None:
    """``panoptic.json`` and ``instances.json`` in the formats of COCO, written image by image."""
    rng = np.random.default_rng(0)
    height, width = SIZE
    things = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]
    ids = [c["id"] for c in COCO_CATEGORIES]
    # COCO's JSON of instances knows things alone.
    categories = {
        "panoptic": COCO_CATEGORIES,
        "instances": [c for c in COCO_CATEGORIES if c["isthing"]],
    }
    files = {name: (folder / f"{name}.json").open("w") for name in categories}
    try:
        for name, file in files.items():
            images = [
                {"id": i, "file_name": f"{i:012}.jpg", "height": height, "width": width}
                for i in range(1, num_images + 1)
            ]
            head = json.dumps({"categories": categories[name], "images": images})
            file.write(head[:-1] + ', "annotations": [')
        for i in range(1, num_images + 1):
            entry = segments_of(rng, i, ids)
            instances = instances_of(rng, i, things)
            comma = "," if i < num_images else ""
            files["panoptic"].write(json.dumps(entry) + comma)
            files["instances"].write(json.dumps(instances)[1:-1] + comma)
        for file in files.values():
            file.write("]}")
    finally:
        for file in files.values():
            file.close()


def segments_of(rng: np.random.Generator, image_id: int, ids: list[int]) -> dict[str, Any]:
    height, width = SIZE
    segments = [
        {
            "id": image_id * 100 + k,
            "category_id": int(category),
            "iscrowd": 0,
            "bbox": [0, 0, width, height],
            "area": height * width // SEGMENTS,
        }
        for k, category in enumerate(rng.choice(ids, SEGMENTS))
    ]
    return {"image_id": image_id, "file_name": f"{image_id:012}.png", "segments_info": segments}


def instances_of(
    rng: np.random.Generator, image_id: int, things: list[int]
) -> list[dict[str, Any]]:
    polygons = rng.uniform(0, SIZE, (INSTANCES, COORDINATES // 2, 2)).round(2)
    return [
        {
            "id": image_id * 100 + k,
            "image_id": image_id,
            "category_id": int(category),
            "iscrowd": 0,
            "bbox": [*polygon.min(axis=0).tolist(), *np.ptp(polygon, axis=0).round(2).tolist()],
            "area": 1000.0,
            "segmentation": [polygon.ravel().tolist()],
        }
        for k, (category, polygon) in enumerate(
            zip(rng.choice(things, INSTANCES), polygons, strict=True)
        )
    ]
