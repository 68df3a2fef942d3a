"""Shapes in the layout of Cityscapes: https://github.com/mcordts/cityscapesScripts

A scene becomes polygons, and these become label images through cityscapesscripts, as those of
Cityscapes did: painted back to front, without holes, so that what is seen through a bicycle is
bicycle. Whatever reads Cityscapes, cityscapesscripts' own programs included, reads this.
"""

import io
import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image
from shapes_scenes import Scene

SIZE = (128, 256)
NUM_IMAGES = {"train": 800, "val": 80}

LABELS = {
    "sky": "sky",
    "grass": "vegetation",
    "water": "road",
    "sand": "sidewalk",
    "brick": "building",
    "disc": "car",
    "square": "truck",
    "triangle": "person",
    "star": "rider",
    "ring": "bicycle",
}
"""The Cityscapes label of each category of Shapes."""

_GROUND_TRUTH = (
    "polygons.json",
    "labelIds.png",
    "labelTrainIds.png",
    "color.png",
    "instanceIds.png",
)


def owned(split: str) -> tuple[str, ...]:
    """What belongs to a split, files and folders, in the order of removal."""
    made_from_it = [f"gtFine/cityscapes_panoptic_{split}{ids}" for ids in ("", "_trainId")]
    jsons = [f"{folder}.json" for folder in made_from_it]
    return *jsons, *made_from_it, f"leftImg8bit/{split}", f"gtFine/{split}"


def picture_files(split: str, number: int) -> tuple[str, ...]:
    city = f"{split.replace('_', '-')}{'stadt' if number % 2 else 'ford'}"
    stem = f"{city}/{city}_{number:06d}_000019"
    return (
        f"leftImg8bit/{split}/{stem}_leftImg8bit.png",
        *(f"gtFine/{split}/{stem}_gtFine_{kind}" for kind in _GROUND_TRUTH),
    )


def annotation_files(split: str) -> tuple[str, ...]:
    return ()


def render(split: str, number: int, scene: Scene) -> tuple[dict[str, bytes], None]:
    """A scene's picture, its polygons and its label images."""
    polygons = json.dumps(_polygons(scene, trailers=number % 8 == 0), indent=1)
    annotation = Annotation()
    annotation.fromJsonText(polygons)
    instance_ids = np.asarray(createInstanceImage(annotation, "ids"))
    contents = (
        _png(Image.fromarray(scene.image)),
        f"{polygons}\n".encode(),
        *(_png(createLabelImage(annotation, kind)) for kind in ("ids", "trainIds", "color")),
        _png(Image.fromarray(instance_ids.astype(np.uint16))),
    )
    return dict(zip(picture_files(split, number), contents, strict=True)), None


def annotate(split: str, records: Sequence[None], version: int) -> dict[str, bytes]:
    return {}


def _polygons(scene: Scene, *, trailers: bool) -> dict[str, Any]:
    """The layers of a scene as a Cityscapes annotation.

    With ``trailers``, they stand in for trucks: a kind of thing that is not evaluated.
    """
    objects = []
    for layer in scene.layers:
        label = LABELS[layer.category.name] if layer.category else "static"
        if label == "truck" and trailers:
            label = "trailer"
        if layer.iscrowd:
            label += "group"
        outlines, _ = cv2.findContours(
            layer.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
        )
        for outline in outlines:
            # Of one or two pixels only, it has their points again: a polygon has three.
            points = np.resize(outline[:, 0], (max(3, len(outline)), 2))
            objects.append({"label": label, "polygon": points.tolist()})
    height, width = scene.segment_map.shape
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()
