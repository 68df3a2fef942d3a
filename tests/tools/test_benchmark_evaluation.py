"""The evaluators of the benchmark, each alone and all together."""

import functools

import pytest
from detectron2.data import DatasetCatalog

from ..conftest import REPOSITORY


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")


@pytest.mark.parametrize("side", [0, 1], ids=["ours", "detectron2"])
def test_all_together_give_what_each_gives_alone(side, tmp_path):
    from benchmark.dataset import make_dataset
    from benchmark.evaluation import EVALUATORS, evaluate

    name = f"benchmark_together_{side}"
    outputs = make_dataset(name, tmp_path, 64, 96, 2)
    run = functools.partial(
        evaluate, dataset_name=name, records=DatasetCatalog.get(name), outputs=outputs
    )
    *alone, together = (run(builders[side]) for builders in EVALUATORS.values())
    expected = {key: value for result in alone for key, value in result.items()}
    assert together.keys() == expected.keys() > set()
    for key, value in expected.items():
        assert together[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key
