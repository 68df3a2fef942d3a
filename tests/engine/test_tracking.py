"""Curves for Weights & Biases and MLflow: stand-ins for what would go over a network."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.engine import Interrupted, Trainer, run_folder, tracking
from panoptic_fpn_ext.engine.tracking import TrackingWriter, build_tracking_writer, check_writer

from ..conftest import on_cpu

pytestmark = on_cpu

SERVICES = ("wandb", "mlflow")


class Service:
    """What a service keeps: of each run its config, points, pictures, and in what state it is."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.fails = ""
        """Why, while nothing can be sent."""
        self.tries = 0

    def answer(self) -> None:
        self.tries += 1
        if self.fails:
            raise ConnectionError(self.fails)

    def open(self, run_id: str | None, **attributes: str) -> SimpleNamespace:
        self.answer()
        run_id = run_id or f"run{len(self.runs)}"
        new = SimpleNamespace(id=run_id, config={}, points={}, pictures={}, **attributes)
        run = self.runs.setdefault(run_id, new)
        run.state = "RUNNING"
        return run


def wandb(service: Service) -> ModuleType:
    module = ModuleType("wandb")
    module.Image = lambda picture: ("image", picture)

    class Run:
        def __init__(self, kept: SimpleNamespace) -> None:
            self.id, self._kept, self._steps = kept.id, kept, {}

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self._steps[name] = step_metric

        def log(self, data: dict) -> None:
            service.answer()
            step = data[self._steps["*"]]
            for name, value in data.items():
                is_picture = isinstance(value, tuple)
                kept = self._kept.pictures if is_picture else self._kept.points
                if name not in self._steps:
                    kept.setdefault(name, []).append((step, value[1] if is_picture else value))

        def finish(self, exit_code: int) -> None:
            service.answer()
            self._kept.state = f"exit {exit_code}"

    def init(*, project, name, dir, id, resume, config, allow_val_change) -> Run:
        assert resume == "allow"
        run = service.open(id, project=project, name=name, folder=dir)
        run.config = config
        return Run(run)

    module.init = init
    return module


def mlflow(service: Service) -> ModuleType:
    module = ModuleType("mlflow")
    module.entities = SimpleNamespace(
        Param=lambda key, value: (key, value),
        Metric=lambda key, value, timestamp, step: (key, value, step),
    )
    experiments: list[str] = []

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
            service.answer()
            if name not in experiments:
                return None
            return SimpleNamespace(experiment_id=str(experiments.index(name)))

        def create_experiment(self, name: str) -> str:
            assert name not in experiments
            experiments.append(name)
            return str(len(experiments) - 1)

        def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
            run = service.open(None, project=experiments[int(experiment_id)], name=run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id=run.id))

        def update_run(self, run_id: str, status: str) -> None:
            assert status == "RUNNING"
            service.open(run_id)

        def log_batch(self, run_id: str, metrics=(), params=()) -> None:
            service.answer()
            assert len(params) <= 100 and len(metrics) <= 1000
            for key, value in params:
                assert len(value) <= 500
                service.runs[run_id].config[key] = value
            for key, value, step in metrics:
                service.runs[run_id].points.setdefault(key, []).append((step, value))

        def log_image(self, run_id: str, image: np.ndarray, *, key: str, step: int) -> None:
            service.runs[run_id].pictures.setdefault(key, []).append((step, image))

        def set_terminated(self, run_id: str, status: str) -> None:
            service.answer()
            service.runs[run_id].state = status

    module.MlflowClient = MlflowClient
    return module


STATES = {
    "wandb": {"FINISHED": "exit 0", "FAILED": "exit 1", "KILLED": "exit 1"},
    "mlflow": {state: state for state in ("FINISHED", "FAILED", "KILLED")},
}


@pytest.fixture(params=SERVICES)
def name(request) -> str:
    return request.param


@pytest.fixture
def service(name: str, monkeypatch) -> Service:
    service = Service()
    module = {"wandb": wandb, "mlflow": mlflow}[name](service)
    module.__spec__ = ModuleSpec(name, None, origin="a stand-in")
    monkeypatch.setitem(sys.modules, name, module)
    return service


@pytest.fixture
def cfg(training_cfg: CfgNode, name: str) -> CfgNode:
    training_cfg.TRACKING.WRITER = name
    return training_cfg


@pytest.fixture
def writer(service: Service, cfg: CfgNode) -> TrackingWriter:
    writer = build_tracking_writer(cfg)
    assert isinstance(writer, TrackingWriter) and not service.runs, "begun by run() alone"
    return writer


def test_a_training_is_a_run(service, cfg, name, tmp_path):
    """Config, losses, scores and pictures are those that Detectron2's writers get."""
    cfg.DATASETS.TEST, cfg.INPUT.MIN_SIZE_TEST = ("shapes_val",), 64
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.TEST.PICTURES = 2, 1, 2
    Trainer(cfg).train()
    (run,) = service.runs.values()
    assert (run.project, run.name) == ("panoptic_fpn_ext", tmp_path.name)
    assert run.state == STATES[name]["FINISHED"]
    found = run.config["SOLVER"]["MAX_ITER"] if name == "wandb" else run.config["SOLVER.MAX_ITER"]
    assert str(found) == "2"

    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    written = {(key, line["iteration"], value) for line in lines for key, value in line.items()} - {
        ("iteration", line["iteration"], line["iteration"]) for line in lines
    }
    sent = {(key, *point) for key, points in run.points.items() for point in points}
    # The printer makes one more, when it prints.
    differ = {key for key, _, value in written ^ sent if not math.isnan(value)}
    assert differ <= {"eta_seconds"}
    assert {key for key, *_ in sent} >= {"loss_sem_seg", "loss_mask", "panoptic_seg/PQ"}

    assert run.pictures.keys() == {f"predictions/shapes_val/{k}_00000000000{k}" for k in (1, 2)}
    for points in run.pictures.values():
        assert [step for step, _ in points] == [0, 2]
        for _, picture in points:
            assert picture.dtype == np.uint8 and picture.shape[::2] == (240, 3)


def test_resuming_goes_on_with_the_run(service, cfg, name, tmp_path):
    cfg.SOLVER.MAX_ITER = 1
    Trainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    (run,) = service.runs.values()
    assert run.state == STATES[name]["FINISHED"]
    steps = [step for step, _ in run.points["total_loss"]]
    assert steps == [0, 1]
    assert (tmp_path / "tracking.json") in run_folder.files_of_training(tmp_path)
    Trainer(cfg).train()  # anew
    assert len(service.runs) == 2


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Interrupted("stopped", 143), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (UserError("no"), "FAILED"),
    ],
)
def test_how_a_run_ends(service, writer, name, error, state):
    with pytest.raises(type(error)), writer.run(resume=False):
        raise error
    assert service.runs["run0"].state == STATES[name][state]


def test_a_failure_stops_no_training_and_is_said_once(service, writer, name, monkeypatch, caplog):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock.now)
    with writer.run(resume=False), EventStorage() as storage:
        service.fails = "no\nroute"
        for iteration in range(20):
            storage.iter = iteration
            storage.put_scalar("loss", 20 - iteration)
            storage.put_scalar("PQ", iteration, smoothing_hint=False)
            tries = service.tries
            writer.write()
            clock.now += 10
            # In 200 s once in 60 s: an outage costs little time.
            assert service.tries - tries == (iteration % 6 == 0)
        assert len(caplog.messages) == 1
        assert f"{name} failed, the training goes on" in caplog.text
        assert "ConnectionError: no route" in caplog.text
        assert service.runs["run0"].points == {}
        service.fails = ""
        writer.close()  # tries a last time
    assert service.runs["run0"].points == {"loss": [(19, 10.5)], "PQ": [(19, 19.0)]}
    assert service.runs["run0"].state == STATES[name]["FINISHED"]


@pytest.mark.parametrize("is_back", [True, False])
def test_the_end_is_told_after_a_failure_too(service, writer, name, is_back):
    with pytest.raises(UserError, match="the disk"), writer.run(resume=False):
        with EventStorage() as storage:
            service.fails = "no route"
            storage.put_scalar("loss", 1.0)
            writer.write()
        if is_back:
            service.fails = ""
        raise UserError("the disk is full")
    expected = STATES[name]["FAILED"] if is_back else "RUNNING"
    assert service.runs["run0"].state == expected


def test_a_service_that_is_away_when_a_training_begins(service, cfg, caplog):
    service.fails = "no route"
    with pytest.raises(UserError, match="no run can be begun: ConnectionError: no route"):
        Trainer(cfg).train()
    service.fails = ""
    cfg.SOLVER.MAX_ITER = 1
    Trainer(cfg).train()
    # A training that has begun goes on without.
    cfg.SOLVER.MAX_ITER, service.fails = 2, "no route"
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert trainer.iter == 2 and "failed, the training goes on" in caplog.text
    # And with it, once it is there again.
    cfg.SOLVER.MAX_ITER = 3
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    answer = service.answer

    def comes_back() -> None:
        service.fails = ""
        service.answer = answer
        raise ConnectionError

    service.answer = comes_back
    trainer.train()
    (run,) = service.runs.values()
    assert [step for step, _ in run.points["total_loss"]] == [0, 2]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"writer": "another", "run": "x"}'])
def test_a_file_that_names_no_run_begins_one(service, writer, tmp_path, content):
    (tmp_path / "tracking.json").write_text(content)
    with writer.run(resume=True):
        pass
    assert list(service.runs) == ["run0"]
    assert json.loads((tmp_path / "tracking.json").read_text())["run"] == "run0"


@pytest.mark.parametrize("name", ["mlflow"])
def test_names_that_mlflow_takes(service, writer):
    with writer.run(resume=False), EventStorage() as storage:
        for key in ("IoU-café (dark)", "IoU-a//b", "IoU-n/a", "AP50"):
            storage.put_scalar(key, 1.0)
        storage.put_image("predictions/é", torch.full((3, 2, 4), 0.5))
        writer.write()
    run = service.runs["run0"]
    assert list(run.points) == ["IoU-café _dark_", "IoU-a/b", "IoU-n/a", "AP50"]
    ((step, picture),) = run.pictures["predictions/_"]
    assert step == 0 and np.array_equal(picture, np.full((2, 4, 3), 128, np.uint8))


def test_a_package_that_is_missing_or_broken_is_one_line(name, cfg, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / name).mkdir()  # a folder of results is no package
    line = f"TRACKING.WRITER {name}: {name} is not installed: pip install {name}"
    with pytest.raises(UserError) as error:
        check_writer(name)
    assert str(error.value) == line
    (tmp_path / name / "__init__.py").write_text("raise TypeError('not with\\n this protobuf')")
    with pytest.raises(UserError, match="cannot be imported: TypeError: not with this protobuf"):
        build_tracking_writer(cfg)
