"""What Detectron2's own mapper reads of our datasets, with nothing converted on disk."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from panoptic_fpn_ext import PanopticFPNMapper, UserError
from panoptic_fpn_ext.data.panoptic_png import write_panoptic_png
from panoptic_fpn_ext.data.virtual_files import sem_seg_file_name

from ..conftest import REPOSITORY
from .test_targets import random_panoptic
from .tiny_dataset import TinyDataset


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**31), is_full=st.booleans(), folder=st.sampled_from(["", "a=1,b/"]))
def test_a_semantic_map_equals_a_loop(tmp_path, seed, is_full, folder):
    ids, segments_info = random_panoptic(seed)
    classes = {0: 3, 1: 4, 2: 5} if is_full else {0: 0, 1: 0, 2: 0}
    png = tmp_path / folder / "panoptic.png"
    png.parent.mkdir(exist_ok=True)
    write_panoptic_png(png, ids)
    with PathManager.open(sem_seg_file_name(str(png), segments_info, classes), "rb") as file:
        image = Image.open(file)
        assert image.mode == "L"
        labels = np.asarray(image)
    class_of = {
        s["id"]: classes[s["category_id"]] if s["isthing"] else s["category_id"]
        for s in segments_info
    }
    expected = [[class_of.get(value, 255) for value in row] for row in ids.tolist()]
    np.testing.assert_array_equal(labels, expected)


def test_a_segment_that_the_json_lacks_is_one_line_that_names_the_png(tmp_path):
    write_panoptic_png(tmp_path / "1.png", np.full((2, 3), 7))
    name = sem_seg_file_name(f"{tmp_path}/1.png", [], {})
    with pytest.raises(UserError, match=r"/1\.png: segment id 7 is not in segments_info"):
        PathManager.open(name, "rb")


def test_a_name_in_a_record_is_opened_by_a_process_that_was_started_afresh(tmp_path):
    write_panoptic_png(tmp_path / "1.png", np.full((2, 3), 7))
    segments_info = [{"id": 7, "category_id": 4, "isthing": False}]
    record = {"sem_seg_file_name": sem_seg_file_name(f"{tmp_path}/1.png", segments_info, {})}
    program = """if True:
        import pickle, sys
        from detectron2.utils.file_io import PathManager
        record = pickle.load(sys.stdin.buffer)
        sys.stdout.buffer.write(PathManager.open(record["sem_seg_file_name"], "rb").read())
        """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        input=pickle.dumps(record),
        capture_output=True,
    )
    assert done.stdout.endswith(b"\4" * 6), done.stderr


@pytest.mark.parametrize("label_space", ["separated", "full"])
def test_the_mapper_of_detectron2_gives_what_ours_does(ext_cfg, tmp_path, label_space):
    """In a worker process; our model learns from it."""
    cfg = ext_cfg
    cfg.INPUT.MASK_FORMAT, cfg.INPUT.MIN_SIZE_TRAIN = "bitmask", (48,)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 1
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2 if label_space == "separated" else 3
    data = TinyDataset(tmp_path / "data")
    with data.registered(instances=True, label_space=label_space) as name:
        cfg.DATASETS.TRAIN = (name,)
        ours = {r["image_id"]: PanopticFPNMapper(cfg)(r) for r in DatasetCatalog.get(name)}
        batch = next(iter(build_detection_train_loader(cfg, mapper=DatasetMapper(cfg))))
        with EventStorage():
            losses = build_model(cfg)(batch)
    assert sorted(theirs["image_id"] for theirs in batch) == [1, 2]
    for theirs in batch:
        expected = ours[theirs["image_id"]]
        assert torch.equal(theirs["image"], expected["image"])
        assert theirs["sem_seg"].dtype == expected["sem_seg"].dtype
        assert torch.equal(theirs["sem_seg"], expected["sem_seg"])
        theirs, expected = theirs["instances"], expected["instances"]
        assert torch.equal(theirs.gt_classes, expected.gt_classes)
        torch.testing.assert_close(theirs.gt_boxes.tensor, expected.gt_boxes.tensor)
        assert torch.equal(theirs.gt_masks.tensor, expected.gt_masks.tensor)
    assert losses.keys() > {"loss_sem_seg", "loss_mask"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_mapper_of_detectron2_without_instance_annotations(detectron2_cfg, tmp_path):
    with TinyDataset(tmp_path / "data").registered() as name:
        (record, _) = DatasetCatalog.get(name)
    mapped = DatasetMapper(detectron2_cfg, is_train=True)(record)
    assert mapped["sem_seg"].unique().tolist() == [0, 1, 255]
    assert "instances" not in mapped
