"""datasets/make_shapes.py: what it draws, what it writes, and what it leaves alone."""

import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import name2label
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

SCRIPT = Path(__file__).parents[2] / "datasets" / "make_shapes.py"
_spec = importlib.util.spec_from_file_location("make_shapes", SCRIPT)
shapes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shapes)

SMALL = {"size": (48, 64), "num_images": {"train": 5, "val": 3}, "seed": 7}
THINGS = {category.id for category in shapes.CATEGORIES if category.isthing}


def files(root):
    """Every file below ``root``, by its path there."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def fill_holes(mask):
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    return cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED).astype(bool)


def read_ids(path):
    rgb = np.asarray(Image.open(path), np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    assert shapes.make_shapes(root, size=(64, 80), num_images={"train": 160, "val": 20})
    return root


@pytest.fixture(scope="module")
def panoptic(tree):
    return json.loads((tree / "annotations" / "panoptic_train.json").read_text())


# What is drawn.


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(32, 150), st.integers(32, 150))
def test_a_scene_and_its_ground_truth_agree(seed, height, width):
    scene = shapes.draw_scene(np.random.default_rng(seed), (height, width))
    assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
    assert scene.segment_map.shape == (height, width) and scene.segment_map.dtype == np.int32
    ids = [segment.id for segment in scene.segments]
    assert len(set(ids)) == len(ids) and all(0 < i < 2**24 for i in ids)
    assert set(np.unique(scene.segment_map)) - {0} == set(ids)
    stuff = [s.category_id for s in scene.segments if s.category_id not in THINGS]
    assert len(stuff) >= 2 and len(set(stuff)) == len(stuff)
    assert sum(s.category_id in THINGS and not s.iscrowd for s in scene.segments) <= 6
    for segment in scene.segments:
        share = (scene.segment_map == segment.id).mean()
        assert share >= (0.001 if segment.category_id in THINGS else 0.04) * min(
            1, min(height, width) / max(height, width)
        )


def test_one_seed_gives_one_scene():
    first, again, other = (shapes.draw_scene(np.random.default_rng(i), (40, 40)) for i in (1, 1, 2))
    assert (first.image == again.image).all() and first.segments == again.segments
    assert (first.segment_map == again.segment_map).all()
    assert (first.image != other.image).any()


def test_every_kind_of_scene_occurs(tree, panoptic):
    counts = Counter()
    categories, with_things = set(), Counter()
    for annotation in panoptic["annotations"]:
        things = [s for s in annotation["segments_info"] if s["category_id"] in THINGS]
        counts["empty"] += not things
        counts["crowd"] += any(s["iscrowd"] for s in things)
        counts["void"] += (read_ids(tree / "panoptic_train" / annotation["file_name"]) == 0).any()
        with_things[sum(not s["iscrowd"] for s in things)] += 1
        categories |= {s["category_id"] for s in annotation["segments_info"]}
    total = len(panoptic["annotations"])
    assert 0.03 < counts["empty"] / total < 0.15
    assert 0.03 < counts["crowd"] / total < 0.15
    assert 0.07 < counts["void"] / total < 0.25
    assert set(with_things) == set(range(7))
    assert categories == {category.id for category in shapes.CATEGORIES}


def test_things_hide_one_another(tree, panoptic):
    """Some boxes of things overlap by much: without occlusion, merging would have no work."""
    hits = 0
    for annotation in panoptic["annotations"]:
        boxes = [s["bbox"] for s in annotation["segments_info"] if s["category_id"] in THINGS]
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[:i]:
                wide = min(x + w, x2 + w2) - max(x, x2)
                high = min(y + h, y2 + h2) - max(y, y2)
                hits += wide > 0 and high > 0 and wide * high > 0.2 * min(w * h, w2 * h2)
    assert hits > 0.1 * len(panoptic["annotations"])


def test_pictures_are_noisy(tree):
    """No region is of one colour, which a threshold could find."""
    image = np.asarray(Image.open(tree / "train" / "000000000001.jpg"), float)
    assert image.shape == (64, 80, 3)
    blocks = image[:64, :80].reshape(8, 8, 10, 8, 3)
    assert (blocks.std(axis=(1, 3)) > 0.5).all()


# What is written.


def test_category_ids_are_as_awkward_as_coco(panoptic):
    ids = [category["id"] for category in panoptic["categories"]]
    isthing = [category["isthing"] for category in panoptic["categories"]]
    assert set(panoptic["categories"][0]) == {"id", "name", "supercategory", "isthing", "color"}
    assert len(set(ids)) == len(ids) and max(ids) > len(ids)
    assert isthing != sorted(isthing) and isthing != sorted(isthing, reverse=True)
    assert 4 <= sum(isthing) <= 5 and 4 <= len(isthing) - sum(isthing) <= 5


@pytest.mark.parametrize("split", ["train", "val"])
def test_json_and_png_hold_the_same_segments(tree, split):
    content = json.loads((tree / "annotations" / f"panoptic_{split}.json").read_text())
    assert set(content) >= {"info", "images", "annotations", "categories"}
    images = {image["id"]: image for image in content["images"]}
    assert {a["image_id"] for a in content["annotations"]} == set(images)
    assert len(images) == len(content["annotations"]) == {"train": 160, "val": 20}[split]
    assert {i["file_name"] for i in content["images"]} == {p.name for p in (tree / split).iterdir()}
    known = {category["id"] for category in content["categories"]}
    large_ids = False
    for annotation in content["annotations"][:20]:
        image = images[annotation["image_id"]]
        ids = read_ids(tree / f"panoptic_{split}" / annotation["file_name"])
        assert ids.shape == (image["height"], image["width"])
        assert Image.open(tree / split / image["file_name"]).size == ids.shape[::-1]
        pixels = {}
        for y, row in enumerate(ids.tolist()):
            for x, i in enumerate(row):
                if i:
                    pixels.setdefault(i, []).append((x, y))
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(segments) == set(pixels) and len(segments) == len(annotation["segments_info"])
        for i, segment in segments.items():
            xs, ys = zip(*pixels[i], strict=True)
            box = [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
            assert segment["area"] == len(xs) and segment["bbox"] == box
            assert segment["category_id"] in known and segment["iscrowd"] in (0, 1)
            assert segment["category_id"] in THINGS or not segment["iscrowd"]
            large_ids |= i > 65535
    assert large_ids  # all three channels are used


def test_instances_are_the_things_of_the_panoptic_annotations(tree, panoptic):
    coco = COCO(str(tree / "annotations" / "instances_train.json"))
    assert set(coco.getCatIds()) == THINGS
    assert set(coco.getImgIds()) == {image["id"] for image in panoptic["images"]}
    with_hole = 0
    for annotation in panoptic["annotations"]:
        ids = read_ids(tree / "panoptic_train" / annotation["file_name"])
        things = [s for s in annotation["segments_info"] if s["category_id"] in THINGS]
        instances = coco.imgToAnns[annotation["image_id"]]
        assert len(instances) == len(things)
        for thing, instance in zip(things, instances, strict=True):
            for key in ("category_id", "iscrowd", "area", "bbox"):
                assert instance[key] == thing[key]
            # As in COCO: RLE for crowds, polygons for all others.
            assert isinstance(instance["segmentation"], dict if thing["iscrowd"] else list)
            mask, drawn = ids == thing["id"], coco.annToMask(instance).astype(bool)
            if thing["iscrowd"]:
                assert (mask == drawn).all()
            else:
                assert all(len(p) >= 6 and len(p) % 2 == 0 for p in instance["segmentation"])
                assert (mask & drawn).sum() / (mask | drawn).sum() > 0.95
                x, y, w, h = thing["bbox"]
                with_hole += not mask[y + h // 2, x + w // 2]
    assert with_hole  # the middle of a ring is not the ring's


def test_instance_ids_are_unique(tree):
    content = json.loads((tree / "annotations" / "instances_train.json").read_text())
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) > 0


# The same arguments, the same bytes.


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        shapes.make_shapes(tmp_path / name, **SMALL)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_command_with_two_workers_gives_the_same_bytes(tmp_path):
    shapes.make_shapes(tmp_path / "a", **SMALL)
    command = [sys.executable, SCRIPT, "--output", tmp_path / "b", "--workers", "2"]
    command += ["--size", "48", "64", "--num-train", "5", "--num-val", "3", "--seed", "7"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0 and "5 train and 3 val images written" in first.stdout
    assert files(tmp_path / "a") == files(tmp_path / "b")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "already complete" in again.stdout


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    shapes.make_shapes(tmp_path / "a", **SMALL)
    shapes.make_shapes(tmp_path / "b", **{**SMALL, "num_images": {"val": 1, "train": 2}})
    more, fewer = files(tmp_path / "a"), files(tmp_path / "b")
    pictures = [name for name in fewer if not name.endswith(".json")]
    assert len(pictures) == 6 and all(more[name] == fewer[name] for name in pictures)


def test_seeds_and_splits_differ(tmp_path):
    shapes.make_shapes(tmp_path / "a", **SMALL)
    shapes.make_shapes(tmp_path / "b", **{**SMALL, "seed": 8})
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first.keys() == second.keys()
    pictures = [name for name in first if name.endswith(".jpg")]
    assert len({first[name] for name in pictures} | {second[name] for name in pictures}) == 16


# A tree that is there already.


def test_a_complete_tree_is_left_alone(tmp_path):
    assert shapes.make_shapes(tmp_path / "a", **SMALL) is True
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert shapes.make_shapes(tmp_path / "a", **SMALL) is False
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("stage", ["drawing", "annotations"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupted_tree_is_made_whole(tmp_path, monkeypatch, stage, calls):
    shapes.make_shapes(tmp_path / "whole", **SMALL)
    name = {"drawing": "draw_scene", "annotations": "_write"}[stage]
    original, left = getattr(shapes, name), [calls]

    def interrupted(*args):
        if stage == "annotations" and args[0].suffix != ".json":
            return original(*args)
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.make_shapes(tmp_path / "cut", **SMALL)
    cut = files(tmp_path / "cut")
    assert len([n for n in cut if n.startswith("annotations")]) == (
        max(0, calls - 1) if stage == "annotations" else 0
    )
    for path in (tmp_path / "cut").glob("train/*"):  # as if it was cut off while written
        path.write_bytes(path.read_bytes()[:100])
    assert shapes.make_shapes(tmp_path / "cut", **SMALL) is True
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    "lost", ["train/000000000002.jpg", "panoptic_val/000000000001.png", "annotations"]
)
def test_what_was_deleted_is_made_again(tmp_path, lost):
    shapes.make_shapes(tmp_path / "a", **SMALL)
    whole = files(tmp_path / "a")
    for path in [tmp_path / "a" / lost, *(tmp_path / "a" / lost).glob("panoptic_train.json")]:
        if path.is_file():
            path.unlink()
    assert shapes.make_shapes(tmp_path / "a", **SMALL) is True
    assert files(tmp_path / "a") == whole


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 8), ("size", (64, 48)), ("num_images", {"train": 2, "val": 1})]
)
def test_other_arguments_need_overwrite(tmp_path, key, value):
    shapes.make_shapes(tmp_path / "a", **SMALL)
    before = files(tmp_path / "a")
    other = {**SMALL, key: value}
    with pytest.raises(shapes.ShapesError, match=f"another {key}: pass --overwrite"):
        shapes.make_shapes(tmp_path / "a", **other)
    assert files(tmp_path / "a") == before
    assert shapes.make_shapes(tmp_path / "a", **other, overwrite=True) is True
    shapes.make_shapes(tmp_path / "b", **other)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("photo.jpg", ""),
        ("recipe.json", "{"),
        ("recipe.json", '{"cake": 1}'),
        ("recipe.json", "[]"),
        ("recipe.json", '{"dataset": "shapes", "num_images": {"..": 1}}'),
    ],
)
def test_files_of_others_are_never_touched(tmp_path, name, text):
    (tmp_path / "train").mkdir()
    (tmp_path / name).write_text(text)
    before = files(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(shapes.ShapesError, match="did not write"):
            shapes.make_shapes(tmp_path, **SMALL, overwrite=overwrite)
    assert files(tmp_path) == before and list((tmp_path / "train").iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / ".hidden").touch()
    assert shapes.make_shapes(tmp_path, **SMALL) is True


# In the layout of Cityscapes.

CITYSCAPES = {**SMALL, "layout": "cityscapes"}


def label_images(root, kind):
    """The label images of all training images, in the order of their numbers."""
    paths = root.glob(f"gtFine/train/*/*_gtFine_{kind}.png")
    number = itemgetter(1)
    return [
        np.asarray(Image.open(path))
        for path in sorted(paths, key=lambda path: number(path.name.split("_")))
    ]


def test_the_tree_is_that_of_cityscapes(tmp_path):
    assert shapes.make_shapes(tmp_path, **CITYSCAPES) is True
    images = sorted(tmp_path.glob("leftImg8bit/*/*/*_leftImg8bit.png"))
    assert len(images) == 8
    cities = {image.parent.name for image in images}
    assert len(cities) == 4 and not any("_" in city for city in cities)
    for image in images:
        city, sequence, frame, _ = image.name.split("_")
        assert city == image.parent.name and len(sequence) == len(frame) == 6
        with Image.open(image) as picture:
            assert (picture.mode, picture.size) == ("RGB", (64, 48))
        stem = str(image).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine")
        modes = {"labelIds": "L", "labelTrainIds": "L", "instanceIds": "I;16", "color": "RGBA"}
        for kind, mode in modes.items():
            with Image.open(f"{stem}_{kind}.png") as picture:
                assert (picture.mode, picture.size) == (mode, (64, 48))
        polygons = json.loads(Path(f"{stem}_polygons.json").read_text())
        assert (polygons["imgHeight"], polygons["imgWidth"]) == (48, 64)
        assert polygons["objects"]
    others = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {
        path.name for path in (*images, *tmp_path.glob("gtFine/*/*/*"))
    }
    assert others == {"recipe.json"}


def test_every_kind_of_label_occurs(tmp_path):
    shapes.make_shapes(tmp_path, layout="cityscapes", size=(64, 128), num_images={"train": 120})
    instance_ids = label_images(tmp_path, "instanceIds")
    found = set(np.unique(np.concatenate(instance_ids)).tolist())
    labels = {i // 1000 if i >= 1000 else i for i in found}
    # Unlabelled, static; road, sidewalk, building, vegetation, sky; five things and a trailer.
    assert labels == {0, 4, 7, 8, 11, 21, 23, 24, 25, 26, 27, 30, 33}
    assert any(24 <= i <= 33 for i in found)  # groups
    for ids, label_ids in zip(instance_ids, label_images(tmp_path, "labelIds"), strict=True):
        assert (np.where(ids >= 1000, ids // 1000, ids) == label_ids).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(32, 150), st.integers(32, 150))
@example(479001601, 32, 32)  # with a pixel on its own
@example(525, 58, 32)  # with a group around a hole
def test_polygons_are_drawn_as_the_scene_is(seed, height, width):
    from shapes_cityscapes import LABELS, render

    scene = shapes.draw_scene(np.random.default_rng(seed), (height, width))
    files, _ = render("train", 1, scene)
    (png,) = (content for name, content in files.items() if name.endswith("_instanceIds.png"))
    ids = np.asarray(Image.open(io.BytesIO(png)))
    names = {category.id: category.name for category in shapes.CATEGORIES}
    # Polygons have no holes: what is in a ring, or between the shapes of a group, is its own.
    holes = np.zeros((height, width), bool)
    for layer in scene.layers:
        if layer.category:
            holes |= fill_holes(layer.mask) & ~layer.mask
    for segment in scene.segments:
        mask = (scene.segment_map == segment.id) & ~holes
        label = name2label[LABELS[names[segment.category_id]]]
        found = ids[mask]
        assert (np.where(found >= 1000, found // 1000, found) == label.id).all()
        if label.hasInstances and not segment.iscrowd and mask.any():
            pieces = np.unique(found)
            assert (pieces >= 1000).all()
            assert not np.isin(pieces, ids[(scene.segment_map != segment.id) & ~holes]).any()
    assert (ids[(scene.segment_map == 0) & ~holes] <= 4).all()


def test_the_cityscapes_layout_is_repeatable_and_mended(tmp_path):
    for name in ("a", "b"):
        assert shapes.make_shapes(tmp_path / name, **CITYSCAPES) is True
    whole = files(tmp_path / "a")
    assert whole == files(tmp_path / "b")
    assert shapes.make_shapes(tmp_path / "a", **CITYSCAPES) is False
    next((tmp_path / "a").glob("gtFine/val/*/*_color.png")).unlink()
    assert shapes.make_shapes(tmp_path / "a", **CITYSCAPES) is True
    assert files(tmp_path / "a") == whole


def test_overwriting_removes_what_was_made_from_the_old_tree(tmp_path):
    shapes.make_shapes(tmp_path / "a", **CITYSCAPES)
    shapes.make_shapes(tmp_path / "b", **CITYSCAPES)
    derived = tmp_path / "a" / "gtFine" / "cityscapes_panoptic_val"
    derived.mkdir()
    derived.with_suffix(".json").write_text("{}")
    assert shapes.make_shapes(tmp_path / "a", **CITYSCAPES) is False  # it does not mind them
    with pytest.raises(shapes.ShapesError, match="another layout: pass --overwrite"):
        shapes.make_shapes(tmp_path / "a", **SMALL)
    for layout in ("coco", "cityscapes"):
        other = {**SMALL, "layout": layout}
        assert shapes.make_shapes(tmp_path / "a", **other, overwrite=True) is True
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_unknown_layout_is_named(tmp_path):
    with pytest.raises(shapes.ShapesError, match="one of coco, cityscapes, not 'voc'"):
        shapes.make_shapes(tmp_path, layout="voc")


# The command.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--size 16 128", "size must be a height and a width of 32 to 4096, not [16, 128]"),
        ("--num-train 0", "the number of train images must be 1 or more, not 0"),
        ("--num-val -3", "the number of val images must be 1 or more, not -3"),
        ("--seed -1", "seed must be 0 or more, not -1"),
        ("--workers 0", "workers must be 1 or more, not 0"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, capsys, arguments, told):
    assert shapes.main(["--output", str(tmp_path / "a"), *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_way_gets_one_line(tmp_path, capsys):
    (tmp_path / "a").write_text("")
    assert shapes.main(["--output", str(tmp_path / "a"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "a") in error and error.count("\n") == 1


@pytest.mark.parametrize("split", ["", "a/b", "..", "annotations", "panoptic_train", "a\n"])
def test_a_split_must_be_a_plain_folder_name(tmp_path, split):
    with pytest.raises(shapes.ShapesError, match="cannot name a split"):
        shapes.make_shapes(tmp_path / "a", num_images={split: 1})


@pytest.mark.parametrize(
    ("layout", "written"),
    [
        ("coco", "shapes/annotations/panoptic_val.json"),
        ("cityscapes", "shapes_cityscapes/gtFine/val/valstadt/*_gtFine_polygons.json"),
    ],
)
def test_the_default_place_is_where_detectron2_looks(
    tmp_path, monkeypatch, capsys, layout, written
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    arguments = ["--size", "32", "32", "--num-train", "1", "--num-val", "1", "--workers", "1"]
    assert shapes.main(["--layout", layout, *arguments]) == 0
    assert len(list(tmp_path.glob(written))) == 1
    assert str(tmp_path / written.partition("/")[0]) in capsys.readouterr().out
