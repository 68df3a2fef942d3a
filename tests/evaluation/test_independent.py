"""Evaluators of which some fail."""

import json
import logging
from pathlib import Path

import pytest
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import launch
from panoptic_fpn_ext.evaluation import ImageEvaluator, IndependentEvaluators


class Failing(DatasetEvaluator):
    """Fails in one method, at the image whose number is ``at``; notes what is called."""

    def __init__(self, method: str, error: Exception, at: int = 2) -> None:
        self.method, self.error, self.at = method, error, at
        self.called = []

    def _call(self, method: str, fails: bool = True) -> None:
        self.called.append(method)
        if method == self.method and fails:
            raise self.error

    def reset(self) -> None:
        self._call("reset")

    def process(self, inputs, outputs) -> None:
        self._call("process", fails=inputs[0]["image_id"] == self.at)

    def evaluate(self) -> dict:
        self._call("evaluate")
        return {"failing": {"score": 1.0}}


class Counter(ImageEvaluator[int]):
    """Counts the images of all processes."""

    output_key = "number"

    def evaluate_image(self, record, prediction, source) -> int:
        return prediction

    def summarize(self, images) -> dict:
        return {"counter": {"sum": sum(images.values())}}


def evaluate(evaluators: IndependentEvaluators, *numbers: int) -> dict:
    evaluators.reset()
    for n in numbers:
        evaluators.process([{"file_name": f"{n}.jpg", "image_id": n}], [{"number": n}])
    return evaluators.evaluate()


CALLS = {
    "reset": ["reset"],
    "process": ["reset", "process", "process"],
    "evaluate": ["reset", "process", "process", "process", "evaluate"],
}


@pytest.mark.parametrize("method", [*CALLS, None])
@pytest.mark.parametrize("place", [0, 1])
def test_one_that_fails_is_out_and_the_others_go_on(method, place, caplog):
    failing, evaluators = Failing(method, KeyError("a\nkey")), [Counter()]
    evaluators.insert(place, failing)
    evaluators = IndependentEvaluators(evaluators)
    results = evaluate(evaluators, 1, 2, 3)
    assert results.pop("counter") == {"sum": 6}
    if method is None:
        assert (results, evaluators.failures) == ({"failing": {"score": 1.0}}, [])
        assert not caplog.records
        return
    assert results == {}
    assert failing.called == CALLS[method]
    assert evaluators.failures == [r"Failing: KeyError: 'a\nkey'"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info[1] is failing.error
    assert f"{evaluators.failures[0]}; it is left out, the others go on" == record.getMessage()


def test_a_user_error_is_said_without_a_traceback(caplog):
    evaluators = IndependentEvaluators([Failing("process", UserError("a.png: damaged"))])
    assert evaluate(evaluators, 1, 2) == {}
    assert evaluators.failures == ["Failing: a.png: damaged"]
    (record,) = caplog.records
    assert record.getMessage() == "Failing: a.png: damaged; it is left out, none is left"
    assert not record.exc_info


def test_the_next_round_begins_anew():
    failing = Failing("process", UserError("at first"))
    evaluators = IndependentEvaluators([failing, Counter()])
    evaluate(evaluators, 2)
    assert evaluate(evaluators, 1) == {"failing": {"score": 1.0}, "counter": {"sum": 1}}
    assert evaluators.failures == []


def test_of_two_with_one_key_the_first_is_kept():
    evaluators = IndependentEvaluators([Counter(), Counter(), Failing(None, UserError(""))])
    results = evaluate(evaluators, 1, 2)
    assert results == {"counter": {"sum": 3}, "failing": {"score": 1.0}}
    assert evaluators.failures == ["Counter: another evaluator has results of counter too"]


def test_results_that_are_none_are_a_failure():
    number = DatasetEvaluator()
    number.evaluate = lambda: 3.0
    evaluators = IndependentEvaluators([number, Counter(), DatasetEvaluator()])
    assert evaluate(evaluators, 1) == {"counter": {"sum": 1}}
    (failure,) = evaluators.failures
    assert failure.startswith("DatasetEvaluator: AttributeError: 'float' object has no attribute")


class Gatherer(Failing):
    """Its processes meet, as those of Detectron2's evaluators, unless it failed before."""

    def evaluate(self) -> dict | None:
        comm.synchronize()
        comm.gather(0)
        super().evaluate()
        return None


def evaluate_in_process(folder: Path) -> None:
    """Each method fails in one process alone; both fail in ``process``, each its own way."""
    rank = comm.get_rank()
    found = []
    for method, failing_rank in (("reset", 0), ("reset", 1), ("process", 0), ("process", 1)):
        gatherer = Gatherer(method if rank == failing_rank else None, UserError(f"of {rank}"))
        evaluators = IndependentEvaluators([gatherer, Counter()])
        found.append([evaluate(evaluators, 2, 3 + rank), evaluators.failures])
    for failing_rank in range(2):
        method = "evaluate" if rank == failing_rank else None
        evaluators = IndependentEvaluators([Gatherer(method, UserError(f"of {rank}")), Counter()])
        found.append([evaluate(evaluators, 2, 3 + rank), evaluators.failures])
    evaluators = IndependentEvaluators([Gatherer("process", UserError(f"of {rank}")), Counter()])
    found.append([evaluate(evaluators, 2, 3 + rank), evaluators.failures])
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_processes_agree_on_who_failed(tmp_path):
    launch(evaluate_in_process, 2, args=(tmp_path,), device="cpu")
    expected = [[f"Gatherer: of {rank}"] for rank in (0, 1, 0, 1, 0, 1, 0)]
    for rank, results in enumerate([{"counter": {"sum": 2 + 3 + 4}}, {}]):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [[results, failures] for failures in expected]
