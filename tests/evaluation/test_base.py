"""What all evaluators do alike, shown by one that adds numbers up."""

import pytest

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.evaluation.base import ImageEvaluator


class Adder(ImageEvaluator[float]):
    output_key = "number"

    def evaluate_image(self, record, prediction, source) -> float:
        if prediction < 0:
            raise UserError(f"{source} is negative")
        return prediction

    def summarize(self, images) -> dict:
        return {"number": {"sum": sum(images.values()), "count": len(images)}}


def records(*numbers: int) -> list[dict]:
    return [{"file_name": f"{n}.jpg", "image_id": n} for n in numbers]


def outputs(*numbers: int) -> list[dict]:
    return [{"number": n, "other": None} for n in numbers]


def test_each_image_counts_once(evaluate_in_processes):
    parts = [(records(1, 2, 1), outputs(1, 2, 1)), (records(2, 5), outputs(2, 5)), ([], [])]
    assert evaluate_in_processes(Adder, parts) == {"number": {"sum": 8, "count": 3}}


@pytest.mark.parametrize("field", ["image_id", "file_name"])
def test_images_of_several_datasets_are_told_apart(field):
    adder = Adder()
    adder.process([{**record, field: "a"} for record in records(1, 2)], outputs(1, 2))
    assert adder.evaluate() == {"number": {"sum": 3, "count": 2}}


def test_an_image_may_lack_an_id():
    adder = Adder()
    adder.process([{"file_name": "a"}, {"file_name": "b"}, {"file_name": "a"}], outputs(1, 2, 1))
    assert adder.evaluate() == {"number": {"sum": 3, "count": 2}}


def test_each_process_may_evaluate_its_own(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda data: pytest.fail("gathered"))
    adder = Adder(distributed=False)
    adder.process(records(1), outputs(1))
    assert adder.evaluate() == {"number": {"sum": 1, "count": 1}}


def test_reset_forgets():
    adder = Adder()
    adder.process(records(1), outputs(1))
    adder.reset()
    adder.process(records(1), outputs(4))
    assert adder.evaluate() == {"number": {"sum": 4, "count": 1}}


def test_faults_are_named():
    adder = Adder()
    with pytest.raises(UserError, match=r"^the prediction for 1\.jpg has no number, only \['b'\]$"):
        adder.process(records(1), [{"b": 0}])
    with pytest.raises(UserError, match=r"^the prediction for 1\.jpg is negative$"):
        adder.process(records(1), outputs(-1))
    with pytest.raises(ValueError, match="zip"):
        adder.process(records(1, 2), outputs(1))
