#!/usr/bin/env python
"""Make Shapes: a small panoptic dataset of drawn scenes, in an official layout.

    python datasets/make_shapes.py                        # 2,000 + 200 images of 128x128
    python datasets/make_shapes.py --layout cityscapes    # 800 + 80 images of 128x256

The scenes: `shapes_scenes.py`. The tree, in COCO's layout (`shapes_coco.py`):

    datasets/shapes/
      train/000000000001.jpg              panoptic_train/000000000001.png
      val/000000000001.jpg                panoptic_val/000000000001.png
      annotations/panoptic_{train,val}.json     every segment
      annotations/instances_{train,val}.json    the things again, as COCO instances
      recipe.json                               the arguments the tree was made with

and in that of Cityscapes (`shapes_cityscapes.py`), to be prepared as that is, with
`prepare_cityscapes.py datasets/shapes_cityscapes`:

    datasets/shapes_cityscapes/
      leftImg8bit/{train,val}/<city>/<city>_000001_000019_leftImg8bit.png
      gtFine/{train,val}/<city>/<city>_000001_000019_gtFine_<what>
          polygons.json, labelIds.png, labelTrainIds.png, instanceIds.png, color.png
      recipe.json

An image depends on the seed, its split, its number and the size alone, so neither the number of
workers nor that of images changes it.
"""

import argparse
import importlib
import json
import multiprocessing
import operator
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from shapes_scenes import CATEGORIES, Category, Scene, Segment, draw_scene
from tqdm import tqdm

__all__ = ["CATEGORIES", "Category", "Scene", "Segment", "ShapesError", "draw_scene", "make_shapes"]

VERSION = 1  # raise it when the pictures change: trees of another version are then told apart
LAYOUTS = {"coco": "shapes", "cityscapes": "shapes_cityscapes"}
"""The layouts, each a module `shapes_<layout>`, and the folder that its tree is made in."""


class ShapesError(ValueError):
    """Something the caller can put right; the message is one line."""


def _layout(name: str) -> ModuleType:
    return importlib.import_module(f"shapes_{name}")


def _write(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.partial")
    partial_file.write_bytes(content)
    os.replace(partial_file, path)


def _make_image(
    root: Path, layout: str, size: tuple[int, int], seed: int, split_and_number: tuple[str, int]
) -> Any:
    """Draw an image and write its files; returns its records for the annotation files."""
    split, number = split_and_number
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), number])
    files, record = _layout(layout).render(split, number, draw_scene(rng, size))
    for name, content in files.items():
        _write(root / name, content)
    return record


def _is_split(name: str) -> bool:
    """Whether a split may be called so: its folders must be ours alone, and below the root."""
    taken = r"annotations$|(cityscapes_)?panoptic_"
    return bool(re.fullmatch(rf"(?!{taken})[A-Za-z0-9][A-Za-z0-9_-]*", name))


def _recipe(
    layout: str, size: tuple[int, int], num_images: Mapping[str, int], seed: int
) -> dict[str, Any]:
    """The arguments, checked, as they are kept in the tree."""
    if len(size) != 2 or not all(32 <= operator.index(side) <= 4096 for side in size):
        raise ShapesError(f"size must be a height and a width of 32 to 4096, not {list(size)}")
    if operator.index(seed) < 0:
        raise ShapesError(f"seed must be 0 or more, not {seed}")
    if not num_images:
        raise ShapesError("num_images names no split")
    for split, number in num_images.items():
        if not _is_split(split):
            raise ShapesError(f"{split!r} cannot name a split: take one like 'train' or 'val'")
        if operator.index(number) < 1:
            raise ShapesError(f"the number of {split} images must be 1 or more, not {number}")
    return {
        "dataset": "shapes",
        "version": VERSION,
        "layout": layout,
        "size": [int(side) for side in size],
        "seed": int(seed),
        "num_images": {split: int(number) for split, number in num_images.items()},
    }


def _read_recipe(root: Path) -> dict[str, Any] | None:
    """The recipe of the tree at ``root``; None where there is nothing yet."""
    if not root.exists():
        return None
    try:
        # The first trees had one layout, and no word for it.
        recipe = {"layout": "coco"} | json.loads((root / "recipe.json").read_text())
        ours = recipe["dataset"] == "shapes" and recipe["layout"] in LAYOUTS
        if ours and all(map(_is_split, recipe["num_images"])):
            return recipe
    except FileNotFoundError:
        if all(entry.name.startswith(".") for entry in root.iterdir()):
            return None
    except (ValueError, KeyError, TypeError):
        pass
    raise ShapesError(
        f"{root} holds files that make_shapes.py did not write: choose another output folder"
    )


def _is_complete(root: Path, recipe: dict[str, Any]) -> bool:
    layout = _layout(recipe["layout"])
    return all(
        (root / name).is_file()
        for split, number in recipe["num_images"].items()
        for names in (
            layout.annotation_files(split),
            *(layout.picture_files(split, i) for i in range(1, number + 1)),
        )
        for name in names
    )


def _remove(root: Path, recipe: dict[str, Any]) -> None:
    for split in recipe["num_images"]:
        for path in (root / name for name in _layout(recipe["layout"]).owned(split)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the workers ...
    threading.Thread(target=_end_with_parent, daemon=True).start()  # ... or is killed itself
    cv2.setNumThreads(1)


def _map(function: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[Any]:
    if workers == 1:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # pictures this small lose more by threads than they gain
        try:
            yield from map(function, items)
        finally:
            cv2.setNumThreads(threads)
        return
    # Spawned: a forked OpenCV or PyTorch may wait for ever for threads it no longer has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare_worker) as pool:
        yield from pool.map(function, items, chunksize=8)


def make_shapes(
    root: str | os.PathLike[str],
    *,
    layout: str = "coco",
    size: tuple[int, int] | None = None,
    num_images: Mapping[str, int] | None = None,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> bool:
    """Make the dataset at ``root``, unless it is there already.

    Each file is written at once, those of all images last, so a tree that has every file is whole.
    One left unfinished by an earlier call with the same arguments is made anew.

    Args:
        root: the folder of the dataset; made if need be.
        layout: one of ``LAYOUTS``.
        size: (height, width) of every image, in pixels; by default the layout's ``SIZE``.
        num_images: how many images each split gets; by default the layout's ``NUM_IMAGES``.
        seed: 0 or more. The same arguments give the same files, byte for byte.
        workers: processes to draw with. With more than one, this module must be importable by
            name from a new process.
        overwrite: replace a dataset that was made with other arguments.
        progress: show a progress bar.

    Returns:
        Whether anything was written: False where the same dataset was already there, whole.

    Raises:
        ShapesError: a bad argument; or ``root`` holds another dataset (and ``overwrite`` is not
            set), or files that are not Shapes at all (then in any case).
    """
    root = Path(root)
    if layout not in LAYOUTS:
        raise ShapesError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    files = _layout(layout)
    num_images = dict(files.NUM_IMAGES if num_images is None else num_images)
    recipe = _recipe(layout, files.SIZE if size is None else size, num_images, seed)
    if workers < 1:
        raise ShapesError(f"workers must be 1 or more, not {workers}")
    existing = _read_recipe(root)
    if existing == recipe and _is_complete(root, recipe):
        return False
    if existing is not None and existing != recipe and not overwrite:
        differing = [key for key in recipe if existing.get(key) != recipe[key]]
        raise ShapesError(
            f"{root} holds Shapes made with another {' and '.join(differing)}: pass "
            "--overwrite to replace it, or choose another output folder"
        )
    if existing is not None:
        _remove(root, existing)
    root.mkdir(parents=True, exist_ok=True)
    # The recipe first: it tells whose the folder is.
    _write(root / "recipe.json", f"{json.dumps(recipe)}\n".encode())

    todo = [(split, i) for split, number in num_images.items() for i in range(1, number + 1)]
    records = _map(partial(_make_image, root, layout, tuple(recipe["size"]), seed), todo, workers)
    records = list(
        tqdm(records, total=len(todo), desc="Shapes", unit="image", disable=not progress)
    )
    start = 0
    for split, number in num_images.items():
        of_split = records[start : start + number]
        for name, content in files.annotate(split, of_split, version=VERSION).items():
            _write(root / name, content)
        start += number
    return True


def main(arguments: list[str] | None = None) -> int:
    datasets = os.getenv("DETECTRON2_DATASETS", "datasets")
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="See the top of this file for the tree it writes.",
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="coco", help="whose files to write")
    parser.add_argument(
        "--output", type=Path, help=f"folder (default: one in {datasets} named for the layout)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels (default: the layout's)"
    )
    parser.add_argument("--num-train", type=int, help="training images (default: the layout's)")
    parser.add_argument("--num-val", type=int, help="validation images (default: the layout's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace Shapes made with other arguments"
    )
    args = parser.parse_args(arguments)
    output = args.output or Path(datasets, LAYOUTS[args.layout])
    num_images = dict(_layout(args.layout).NUM_IMAGES)
    for split, number in (("train", args.num_train), ("val", args.num_val)):
        if number is not None:
            num_images[split] = number
    try:
        written = make_shapes(
            output,
            layout=args.layout,
            size=tuple(args.size) if args.size else None,
            num_images=num_images,
            seed=args.seed,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=True,
        )
    except (ShapesError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command makes the dataset anew", file=sys.stderr)
        return 130
    state = "written to" if written else "already complete in"
    images = " and ".join(f"{number} {split}" for split, number in num_images.items())
    print(f"Shapes: {images} images {state} {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
