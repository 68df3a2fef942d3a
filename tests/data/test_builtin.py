"""The datasets that are there once the package is imported: categories, paths, records."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import trainId2label
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data.builtin import register_cityscapes
from panoptic_fpn_ext.evaluation import EVALUATOR_REGISTRY

from ..conftest import REPOSITORY

COCO = [f"coco_2017_{split}_panoptic_fpn" for split in ("train", "val", "val_100")]
CITYSCAPES = [f"cityscapes_fine_panoptic_fpn_{split}" for split in ("train", "val")]
SHAPES = [f"shapes{layout}_{s}" for layout in ("", "_cityscapes") for s in ("train", "val")]


@pytest.mark.parametrize("name", [*COCO, *CITYSCAPES, *SHAPES])
def test_datasets_are_registered_with_evaluators_that_exist(name):
    assert name in DatasetCatalog.list()
    assert all(e in EVALUATOR_REGISTRY for e in MetadataCatalog.get(name).evaluators)


@pytest.mark.parametrize("name", COCO)
def test_coco_has_the_classes_of_detectron2_without_any_file(name):
    ours = MetadataCatalog.get(name)
    theirs = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    assert ours.thing_classes == theirs.thing_classes
    assert ours.stuff_classes == theirs.stuff_classes
    assert ours.thing_colors == theirs.thing_colors
    assert ours.stuff_colors == theirs.stuff_colors
    things = theirs.thing_dataset_id_to_contiguous_id
    assert ours.thing_dataset_id_to_contiguous_id == things
    assert ours.stuff_dataset_id_to_contiguous_id == {
        i: c for i, c in theirs.stuff_dataset_id_to_contiguous_id.items() if i not in things
    }
    assert ours.thing_sem_seg_ids == (0,) * 80


def test_coco_lies_where_detectron2_looks():
    for split in ("train", "val", "val_100"):
        ours = MetadataCatalog.get(f"coco_2017_{split}_panoptic_fpn")
        theirs = MetadataCatalog.get(f"coco_2017_{split}_panoptic_separated")
        for key in ("image_root", "panoptic_json", "json_file"):
            assert getattr(ours, key).endswith("/".join(getattr(theirs, key).split("/")[-2:]))
        # The folder of the 100 is but links into the whole one.
        assert theirs.panoptic_root.removesuffix("_100").endswith(
            ours.panoptic_root.rpartition("/")[2]
        )


@pytest.mark.parametrize("name", CITYSCAPES)
def test_cityscapes_has_its_train_ids_without_any_file(name):
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == [trainId2label[i].name for i in range(19)]
    assert metadata.stuff_colors == [list(trainId2label[i].color) for i in range(19)]
    assert metadata.thing_classes == metadata.stuff_classes[11:]
    assert metadata.thing_sem_seg_ids == tuple(range(11, 19))
    assert metadata.submission_name == f"cityscapes_panoptic_{name.rpartition('_')[2]}"
    assert list(metadata.thing_dataset_id_to_contiguous_id) == [24, 25, 26, 27, 28, 31, 32, 33]


@pytest.fixture
def tree(tmp_path, capfd):
    """One image of Cityscapes ground truth, registered; call it to run createPanopticImgs."""
    ids = np.zeros((8, 16), np.uint16)
    ids[2:], ids[4:, :8], ids[4:, 8:12], ids[4:, 12:] = 7, 26000, 26, 29000
    folder = tmp_path / "gtFine" / "val" / "ulm"
    folder.mkdir(parents=True)
    Image.fromarray(ids).save(folder / "ulm_000003_000019_gtFine_instanceIds.png")
    register_cityscapes(tmp_path, "test_builtin")
    yield lambda **how: convert2panoptic(str(tmp_path / "gtFine"), setNames=["val"], **how)
    for split in ("train", "val"):
        DatasetCatalog.remove(f"test_builtin_{split}")
        MetadataCatalog.remove(f"test_builtin_{split}")


def test_cityscapes_records(tree, tmp_path):
    tree()
    (record,) = DatasetCatalog.get("test_builtin_val")
    image_id = "ulm_000003_000019"
    images = tmp_path / "leftImg8bit" / "val" / "ulm"
    assert record["file_name"] == str(images / f"{image_id}_leftImg8bit.png")
    assert record["image_id"] == image_id
    assert (record["height"], record["width"]) == (8, 16)
    assert Image.open(record["pan_seg_file_name"]).size == (16, 8)
    found = {
        s["id"]: (s["isthing"], s["category_id"], s["iscrowd"]) for s in record["segments_info"]
    }
    # A caravan (29) is void.
    assert found == {7: (False, 0, 0), 26: (True, 2, 1), 26000: (True, 2, 0)}


def test_train_ids_where_label_ids_belong_are_told_apart(tree, tmp_path):
    tree(useTrainId=True)
    for path in (tmp_path / "gtFine").glob("cityscapes_panoptic_val_trainId*"):
        path.rename(path.with_name(path.name.replace("_trainId", "")))
    with pytest.raises(UserError, match=r"_val\.json: category 0 \(road\) is not one that dataset"):
        DatasetCatalog.get("test_builtin_val")


def test_importing_leaves_the_cityscapes_of_others_alone(tmp_path):
    """Detectron2's loader, which its main branch cannot run, and cityscapesscripts' programs."""
    program = (
        "import sys, detectron2.data; before = set(sys.modules); import panoptic_fpn_ext; "
        "print(*sorted(set(sys.modules) - before))"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "nowhere")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=environment,
    )
    modules = run.stdout.split()
    assert "panoptic_fpn_ext.data.builtin" in modules
    assert not [m for m in modules if m.startswith("detectron2.data") and "cityscapes" in m]
    assert not [m for m in modules if m.startswith("cityscapesscripts.evaluation")]
