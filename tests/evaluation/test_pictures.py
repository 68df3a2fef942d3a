"""Pictures of predictions: what is drawn of which outputs."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png
from panoptic_fpn_ext.evaluation.pictures import GAP, HEIGHT, PredictionPictures, predicted_maps


def panels(picture: np.ndarray) -> list[np.ndarray]:
    """What lies side by side in a picture of square images."""
    assert picture.shape[0] == HEIGHT and (picture.shape[1] + GAP) % (HEIGHT + GAP) == 0
    return [picture[:, x : x + HEIGHT] for x in range(0, picture.shape[1], HEIGHT + GAP)]


def test_outside_a_training_nothing_is_drawn(shapes):
    evaluator = PredictionPictures(dataset_name="shapes_val", number=2)
    evaluator.reset()
    evaluator.process([{"file_name": "nowhere.jpg"}], [{}])
    assert evaluator.evaluate() is None


class TestWhatIsDrawn:
    @pytest.fixture
    def record(self, shapes) -> dict:
        return DatasetCatalog.get("shapes_val")[0]

    @pytest.fixture
    def truth(self, record) -> tuple[torch.Tensor, list[dict]]:
        return torch.tensor(read_panoptic_png(record["pan_seg_file_name"])), record["segments_info"]

    @staticmethod
    def drawn(record: dict, output: dict) -> list[np.ndarray]:
        evaluator = PredictionPictures(dataset_name="shapes_val", number=1)
        evaluator.reset()
        with EventStorage() as storage:
            evaluator.process([record], [output])
            evaluator.process([record], [output])  # no more than one
            ((_, picture, _),) = storage._vis_data
        assert picture.dtype == np.uint8 and picture.shape[:2] == (3, HEIGHT)
        return panels(picture.transpose(1, 2, 0))

    def test_a_perfect_map_looks_as_the_truth_does(self, record, truth):
        _, prediction, true = self.drawn(record, {"panoptic_seg": truth, "sem_seg": None})
        assert np.array_equal(prediction, true)

    def test_semantic_output_alone(self, record, truth):
        """In the colours of the classes, those of the truth; things are class 0."""
        ids, segments = truth
        names = MetadataCatalog.get("shapes_val").stuff_classes
        logits = torch.zeros(len(names), *ids.shape)
        for segment in segments:
            label = 0 if segment["isthing"] else segment["category_id"]
            logits[label][ids == segment["id"]] = 1
        _, prediction, true = self.drawn(record, {"sem_seg": logits})
        is_stuff = torch.zeros(ids.shape)
        for segment in segments:
            is_stuff[(ids == segment["id"])] = not segment["isthing"]
        inner = -torch.nn.functional.max_pool2d(-is_stuff[None], 9, 1, 4)[0]  # without outlines
        inner = np.asarray(Image.fromarray(inner.numpy() > 0).resize((HEIGHT, HEIGHT)))
        same = (prediction == true).all(axis=2)
        assert same[inner].mean() > 0.8  # labels lie elsewhere
        assert same.mean() < 1

    def test_labels_alone_are_truth_too(self, record, truth, tmp_path):
        ids, _ = truth
        labels = np.ones(ids.shape, np.uint8)
        labels[:20], labels[-9:] = 2, 255
        Image.fromarray(labels).save(tmp_path / "labels.png")
        only = {
            "file_name": record["file_name"],
            "sem_seg_file_name": str(tmp_path / "labels.png"),
        }
        logits = torch.nn.functional.one_hot(torch.tensor(labels % 255).long(), 6)
        image, prediction, true = self.drawn(only, {"sem_seg": logits.permute(2, 0, 1).float()})
        assert np.array_equal(prediction[: HEIGHT // 2], true[: HEIGHT // 2])
        assert np.array_equal(true[-20:], image[-20:]), "ignored pixels stay as they are"

    def test_both_outputs_without_the_panoptic_one(self, record, truth):
        ids, _ = truth
        instances = Instances(ids.shape)
        instances.pred_boxes = Boxes(torch.zeros(2, 4))
        instances.pred_masks = torch.zeros(2, *ids.shape, dtype=torch.bool)
        instances.scores, instances.pred_classes = torch.tensor([0.9, 0.3]), torch.tensor([1, 2])
        sem_seg = torch.zeros(6, *ids.shape)
        assert len(self.drawn(record, {"instances": instances, "sem_seg": sem_seg})) == 4
        without_masks = Instances(ids.shape, scores=torch.ones(1))
        assert len(self.drawn(record, {"instances": without_masks})) == 2

    def test_the_instance_of_the_higher_score_is_seen(self):
        instances = Instances((1, 4))
        instances.pred_masks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]]]) > 0
        instances.scores = torch.tensor([0.6, 0.9, 0.4])
        instances.pred_classes = torch.tensor([3, 1, 2])
        ((ids, segments),) = predicted_maps({"instances": instances}, score_threshold=0.5)
        category = {s["id"]: (s["category_id"], s["isthing"]) for s in segments} | {0: None}
        found = [category[k] for k in ids.ravel().tolist()]
        assert found == [(3, True), (1, True), (1, True), None]
        assert [s["score"] for s in segments] == pytest.approx([0.6, 0.9])

    def test_an_image_without_ground_truth(self, record, truth):
        only = {"file_name": record["file_name"]}
        assert len(self.drawn(only, {"panoptic_seg": truth})) == 2
