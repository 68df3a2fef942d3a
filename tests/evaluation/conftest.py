"""Predictions for Shapes that are right in part, without a model."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png

from ..conftest import moved


def prediction(rng: np.random.Generator, record: dict, num_things: int, num_stuff: int) -> dict:
    """The ground truth of an image, shifted, with wrong categories, lost and doubled segments."""
    ids = np.roll(read_panoptic_png(record["pan_seg_file_name"]), rng.integers(-2, 3, 2), (0, 1))
    panoptic, segments, masks, classes = np.zeros_like(ids), [], [], []
    logits = torch.from_numpy(rng.random((num_stuff, *ids.shape), dtype=np.float32))
    for info in record["segments_info"]:
        mask = ids == info["id"]
        category = info["category_id"]
        logits[0 if info["isthing"] else category][torch.from_numpy(mask)] += 0.7
        if info["isthing"]:
            if rng.random() < 0.3:
                category = int(rng.integers(num_things))
            for _ in range(rng.integers(1, 3)):
                masks.append(np.roll(mask, rng.integers(-2, 3, 2), (0, 1)))
                classes.append(category)
        if mask.any() and rng.random() < 0.9:
            isthing = info["isthing"]
            segments.append({"id": len(segments) + 1, "isthing": isthing, "category_id": category})
            panoptic[mask] = len(segments)
    instances = Instances(ids.shape)
    instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *ids.shape))
    instances.pred_boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    instances.pred_boxes.tensor += torch.from_numpy(rng.random((len(masks), 4), dtype=np.float32))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    # Few different scores, so that some are equal.
    instances.scores = torch.from_numpy(rng.choice([0.25, 0.5, 0.9], len(masks)).astype(np.float32))
    return {
        "panoptic_seg": (torch.from_numpy(panoptic), segments),
        "sem_seg": logits,
        "instances": instances,
    }


@pytest.fixture
def shapes_predictions(shapes, device: torch.device) -> tuple[list[dict], list[dict]]:
    """The records of ``shapes_val``, as the test loader gives them, and outputs for them."""
    metadata = MetadataCatalog.get("shapes_val")
    rng = np.random.default_rng(0)
    records = [
        {key: value for key, value in record.items() if key != "annotations"}
        for record in DatasetCatalog.get("shapes_val")
    ]
    sizes = len(metadata.thing_classes), len(metadata.stuff_classes)
    return records, moved([prediction(rng, record, *sizes) for record in records], device)


@pytest.fixture
def shapes_without_json(shapes):
    """``shapes_val`` under another name, without its instances JSON."""
    from panoptic_fpn_ext import register_panoptic_dataset

    name = "shapes_val_panoptic_only"
    register_panoptic_dataset(
        name, shapes / "val", shapes / "panoptic_val", shapes / "annotations/panoptic_val.json"
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def evaluate_in_processes(monkeypatch):
    """A function that evaluates as several processes would."""

    def evaluate(build: Callable[[], DatasetEvaluator], parts: list[tuple[list, list]]):
        """What the first process returns.

        Args:
            build: makes the evaluator of a process.
            parts: the records and outputs of each process.
        """
        evaluators = [build() for _ in parts]
        for evaluator, (records, outputs) in zip(evaluators, parts, strict=True):
            for record, output in zip(records, outputs, strict=True):
                evaluator.process([record], [output])
        sent = []
        with monkeypatch.context() as patch:
            patch.setattr(comm, "is_main_process", lambda: False)
            patch.setattr(comm, "gather", lambda data: sent.append(pickle.dumps(data)) or [])
            assert [evaluator.evaluate() for evaluator in evaluators[1:]] == [None] * len(parts[1:])
            patch.setattr(comm, "is_main_process", lambda: True)
            patch.setattr(comm, "gather", lambda data: [data, *map(pickle.loads, sent)])
            return evaluators[0].evaluate()

    return evaluate


def in_parts(rng: np.random.Generator, num_parts: int, *columns: list) -> list[tuple[list, ...]]:
    """Lists in random order in parts of one length, for which some entries come twice."""
    length = -(-len(columns[0]) // num_parts) * num_parts
    order = np.resize(rng.permutation(len(columns[0])), length)
    return [
        tuple([column[i] for i in part] for column in columns)
        for part in np.split(order, num_parts)
    ]
