"""docs/images/draw.py, as far as it needs no trained network."""

import importlib.util

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png

from .conftest import REPOSITORY


def test_label_spaces_have_the_colours_of_their_categories(shapes) -> None:
    path = REPOSITORY / "docs" / "images" / "draw.py"
    spec = importlib.util.spec_from_file_location("draw_pictures", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    dataset = MetadataCatalog.get("shapes_val")
    record = next(r for r in DatasetCatalog.get("shapes_val") if r["image_id"] == 1)
    try:
        panels = script.label_spaces(dataset.as_dict(), image_id=1).axes
    finally:
        for name in ("separated", "full"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    image, separated, full = (panel.images[0].get_array() for panel in panels)
    assert image.shape == separated.shape == full.shape
    ids = read_panoptic_png(record["pan_seg_file_name"])
    for segment in record["segments_info"]:
        kind = "thing" if segment["isthing"] else "stuff"
        color = getattr(dataset, f"{kind}_colors")[segment["category_id"]]
        mask = ids == segment["id"]
        assert (full[mask] == color).all()
        assert (separated[mask] == (dataset.stuff_colors[0] if segment["isthing"] else color)).all()
    names = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in panels[1:]]
    assert names[0] == [f"{k} {name}" for k, name in enumerate(dataset.stuff_classes)]
    assert len(names[1]) == 10 and np.unique(names[1]).size == 10
