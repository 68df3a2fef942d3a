#!/usr/bin/env python
"""Draw the pictures beside this file anew, from what `make quickstart` made.

    python docs/images/draw.py

quickstart.jpg is of validation images with many things, chosen by hand, the network's mistakes on
them included.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from panoptic_fpn_ext import register_panoptic_dataset
from panoptic_fpn_ext.data.image_files import read_image
from panoptic_fpn_ext.data.label_space import thing_sem_seg_ids
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.data.registration import LABEL_SPACES
from panoptic_fpn_ext.data.targets import sem_seg_from_panoptic

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RUN = "output/quickstart"
IMAGES = (5, 15, 149, 145, 199, 119)
VOID = 255


def main() -> None:
    os.chdir(REPOSITORY)
    label_spaces(MetadataCatalog.get("shapes_val").as_dict(), image_id=IMAGES[0]).savefig(
        HERE / "label_spaces.png", dpi=100
    )
    chosen = "--image-ids", ",".join(map(str, IMAGES))
    tool("draw_predictions", "--output", HERE / "quickstart.jpg", *chosen, "--height", "142")
    tool("tune_merging", "--limit", "40")
    shutil.copy(f"{RUN}/tune_merging/thresholds.png", HERE)
    report(REPOSITORY / RUN / "inference" / "report.html", HERE / "report.png")


def tool(name: str, *arguments: str | Path) -> None:
    """Run a tool with the network of the quickstart."""
    command = [sys.executable, f"tools/{name}.py", "--config-file", f"{RUN}/config.yaml"]
    weights = ["MODEL.WEIGHTS", f"{RUN}/model_final.pth"]
    subprocess.run([*command, *arguments, *weights], check=True)


def report(page: Path, picture: Path) -> None:
    """The upper part of the report, as Chromium shows it; nothing where there is no Chromium."""
    browser = shutil.which("chromium")
    if not browser:
        print(f"no chromium: {picture.name} stays as it is (apt-get install chromium)")
        return
    flags = "headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=1000,1560"
    command = [browser, *(f"--{flag}" for flag in flags), "--virtual-time-budget=3000"]
    subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()],
        check=True,
        stderr=subprocess.DEVNULL,  # of services that a browser on a server misses
    )


def label_spaces(dataset: dict[str, Any], image_id: int) -> Figure:
    """An image, and its semantic map in each of the label spaces of a dataset."""
    figure = Figure(figsize=(9, 3.9))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.24, wspace=0.05)
    first, *others = figure.subplots(1, 1 + len(LABEL_SPACES))
    for panel, space in zip(others, LABEL_SPACES, strict=True):
        register_panoptic_dataset(
            space,
            *(dataset[key] for key in ("image_root", "panoptic_root", "panoptic_json")),
            label_space=space,
        )
        record = next(r for r in DatasetCatalog.get(space) if r["image_id"] == image_id)
        show(first, read_image(record, "RGB"), "image")
        metadata = MetadataCatalog.get(space)
        classes = sem_seg_from_panoptic(
            read_panoptic_png(record["pan_seg_file_name"]),
            record["segments_info"],
            thing_sem_seg_ids=thing_sem_seg_ids(metadata),
            ignore_label=VOID,
        )
        colors = np.full((VOID + 1, 3), 255, np.uint8)
        colors[: len(metadata.stuff_colors)] = metadata.stuff_colors
        show(panel, colors[classes], f'label_space="{space}"')
        names = [
            Patch(color=colors[k] / 255, label=f"{k} {name}")
            for k, name in enumerate(metadata.stuff_classes)
        ]
        panel.legend(
            handles=names,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            ncols=3,
            handlelength=1,
            columnspacing=1.2,
            frameon=False,
        )
    return figure


def show(panel: Axes, picture: np.ndarray, title: str) -> None:
    panel.imshow(picture)
    panel.set_title(title, fontsize="medium")
    panel.set_axis_off()


if __name__ == "__main__":
    main()
