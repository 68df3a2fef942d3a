"""Predictor, and results as COCO files."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from PIL import Image
from pycocotools import mask as rle

from panoptic_fpn_ext import (
    Predictor,
    UserError,
    add_panoptic_fpn_config,
    write_instance_results,
    write_panoptic_results,
)


@pytest.fixture
def cfg(trained, shapes, device) -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    cfg.merge_from_file(str(trained / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    cfg.MODEL.DEVICE = device.type
    return cfg


@pytest.fixture
def files(shapes) -> list[str]:
    return [str(path) for path in sorted((shapes / "val").glob("*.jpg"))]


def test_gives_what_default_predictor_gives_whatever_the_batch(cfg, files, tmp_path) -> None:
    wide = str(tmp_path / "77.png")
    cv2.imwrite(wide, cv2.imread(files[0])[:40])  # another size in the midst of a batch
    names = [*files[:2], wide, *files[2:]]
    alone = DefaultPredictor(cfg)
    results = list(Predictor(cfg, batch_size=4)(iter(names)))
    assert [result["file_name"] for result in results] == names
    assert [result["image_id"] for result in results][2] == 77
    for name, result in zip(names, results, strict=True):
        expected = alone(cv2.imread(name))
        ids, segments = expected["panoptic_seg"]
        found, found_segments = result["panoptic_seg"]
        assert (ids == found).float().mean() > 0.99
        assert [s["category_id"] for s in found_segments] == [s["category_id"] for s in segments]
        scores = result["instances"].scores, expected["instances"].scores
        torch.testing.assert_close(*scores, atol=1e-4, rtol=0)


def test_arrays_are_bgr_and_tensors_rgb(cfg, files) -> None:
    bgr = cv2.imread(files[0])
    rgb = torch.from_numpy(np.ascontiguousarray(bgr[:, :, ::-1].transpose(2, 0, 1)))
    first, second, third = Predictor(cfg)([files[0], bgr, rgb])
    for other in (second, third):
        torch.testing.assert_close(first["sem_seg"], other["sem_seg"], atol=1e-4, rtol=1e-4)


def test_a_long_line_keeps_a_row(cfg) -> None:
    (result,) = Predictor(cfg)([np.zeros((1, 900, 3), np.uint8)])
    assert result["panoptic_seg"][0].shape == (1, 900)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(4, 4, 3\)"),
        (None, "NoneType"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_named(cfg, image, message) -> None:
    with pytest.raises(UserError, match=message):
        list(Predictor(cfg)([image]))


def test_results_become_coco_files(cfg, files, tmp_path) -> None:
    predictor = Predictor(cfg)
    results = list(predictor(files))
    assert write_panoptic_results(iter(results), tmp_path / "out", predictor.metadata) == 6
    file = tmp_path / "out" / "instances_results.json"
    number = write_instance_results(iter(results), file, predictor.metadata)

    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    for result, entry in zip(results, content["annotations"], strict=True):
        png = np.asarray(Image.open(tmp_path / "out" / "panoptic" / entry["file_name"]))
        ids, segments = result["panoptic_seg"]
        assert np.array_equal(png @ [1, 256, 65536], ids.cpu().numpy())
        assert len(entry["segments_info"]) == len(segments)

    found = json.loads(file.read_text())
    assert number == len(found) == sum(len(result["instances"]) for result in results) > 0
    masks = [mask for result in results for mask in result["instances"].pred_masks.cpu().numpy()]
    for entry, mask in zip(found, masks, strict=True):
        assert np.array_equal(rle.decode(entry["segmentation"]), mask)
    ids = set(predictor.metadata.thing_dataset_id_to_contiguous_id)
    assert {entry["category_id"] for entry in found} <= ids


def test_two_images_of_one_name_are_refused(cfg, files, tmp_path) -> None:
    predictor = Predictor(cfg)
    results = predictor([files[0], files[0]])
    with pytest.raises(UserError, match="two images are called"):
        write_panoptic_results(results, tmp_path, predictor.metadata)


def test_results_without_the_output_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="has no instances"):
        metadata = type("Metadata", (), {})()
        metadata.thing_dataset_id_to_contiguous_id, metadata.thing_classes = {}, []
        write_instance_results([{"file_name": "a"}], tmp_path / "a.json", metadata)
    assert not list(tmp_path.iterdir())
