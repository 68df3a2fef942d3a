"""Curves for a service that tracks experiments, Weights & Biases or MLflow: ``TRACKING.WRITER``.

The service's package is imported when a training asks for it. Which server, account or local folder
it writes to is up to its own environment variables.
"""

import importlib.util
import json
import logging
import os
import posixpath
import re
import textwrap
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..config_differences import flat
from ..errors import UserError
from .interruption import Interrupted

RUN_FILE = "tracking.json"
"""In ``OUTPUT_DIR``: the service, and its id of the run, for ``--resume``."""
SHORTEST_PAUSE = 60.0
"""Seconds for which a service that failed is left alone; longer if failing took long."""

logger = logging.getLogger(__name__)


class TrackingWriter(EventWriter):
    """Sends what Detectron2's writers write to a service; what fails there stops no training.

    It must come before the ``TensorboardXWriter``, which takes the pictures out of the storage.
    Subclasses talk to a service.
    """

    package: ClassVar[str]
    """What is imported."""

    def __init__(
        self,
        *,
        folder: str,
        project: str,
        name: str,
        config: Mapping[str, Any],
        window_size: int = 20,
    ) -> None:
        """
        Args:
            folder: the output folder of the training.
            project: of the service, which its runs are listed under.
            name: of the run.
            config: what the service shows as the config of the run, nested.
            window_size: of the median of losses, as in Detectron2's writers.

        Raises:
            UserError: the package is not installed, or cannot be imported.
        """
        check_writer(self.package)
        try:
            self._module = importlib.import_module(self.package)
        except Exception as error:  # whatever its dependencies raise
            raise UserError(
                f"TRACKING.WRITER {self.package}: cannot be imported: {_one_line(error)}"
            ) from error
        self._folder, self._project, self._name = Path(folder), project, name
        self._config, self._window_size = config, window_size
        self._run_id: str | None = None
        self._has_begun = False
        self._last_write = -1
        self._silent_until = 0.0
        self._has_warned = False

    @abstractmethod
    def _begin(self, run_id: str | None) -> str:
        """Begin a run, or go on with that of an id; its id."""

    @abstractmethod
    def _log(
        self, iteration: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Send what belongs to an iteration; pictures are (H, W, 3) uint8, RGB."""

    @abstractmethod
    def _end(self, state: str) -> None:
        """End the run: ``"FINISHED"``, ``"FAILED"`` or ``"KILLED"``."""

    @contextmanager
    def run(self, *, resume: bool) -> Iterator[None]:
        """While in it, a run of the service is the training.

        Args:
            resume: go on with the run of the folder, if there is one of this service.

        Raises:
            UserError: no run can be begun. A resumed training goes on without.
        """
        self._run_id = self._known_run() if resume else None
        if self._run_id is None:
            try:
                self._begin_run()
            except Exception as error:
                raise UserError(
                    f"TRACKING.WRITER {self.package}: no run can be begun: {_one_line(error)}"
                ) from error
        else:
            self._guarded(self._begin_run)
        state = "FAILED"
        try:
            yield
            state = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            state = "KILLED"
            raise
        finally:
            if self._has_begun:
                self._silent_until = 0.0
                self._guarded(self._end, state)

    def write(self) -> None:
        """Send what is new in the storage; of scalars the newest, those of losses as medians."""
        storage = get_event_storage()
        scalars: dict[int, dict[str, float]] = defaultdict(dict)
        pictures: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        latest = storage.latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            scalars[iteration][name] = value
        for name, picture, iteration in storage._vis_data:
            pictures[iteration][name] = _as_bytes(picture)
        for iteration in sorted(scalars.keys() | pictures.keys()):
            if iteration > self._last_write:
                self._guarded(self._send, iteration, scalars[iteration], pictures[iteration])

    def close(self) -> None:
        """A last try, where the service failed."""
        self._silent_until = 0.0
        self.write()

    def _send(self, iteration: int, *what: Any) -> None:
        if not self._has_begun:
            self._begin_run()
        self._log(iteration, *what)
        self._last_write = iteration

    def _begin_run(self) -> None:
        self._run_id = self._begin(self._run_id)
        self._has_begun = True
        content = {"writer": self.package, "run": self._run_id}
        (self._folder / RUN_FILE).write_text(json.dumps(content))

    def _known_run(self) -> str | None:
        try:
            content = json.loads((self._folder / RUN_FILE).read_text())
            return content["run"] if content["writer"] == self.package else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _guarded(self, function: Any, *arguments: Any) -> None:
        """Call it; after a failure nothing for a while, so that waiting costs little time."""
        began = time.monotonic()
        if began < self._silent_until:
            return
        try:
            function(*arguments)
        except Exception as error:  # of a network, in whatever words
            now = time.monotonic()
            self._silent_until = now + max(SHORTEST_PAUSE, 20 * (now - began))
            if not self._has_warned:
                logger.warning(
                    "%s failed, the training goes on; metrics.json has all scalars: %s",
                    *(self.package, _one_line(error)),
                )
            self._has_warned = True


class WandbWriter(TrackingWriter):
    """Weights & Biases. Without a network: ``WANDB_MODE=offline``, and later ``wandb sync``."""

    package = "wandb"

    def _begin(self, run_id: str | None) -> str:
        self._run = self._module.init(
            project=self._project,
            name=self._name,
            dir=str(self._folder),
            id=run_id,
            resume="allow",
            config=dict(self._config),
            allow_val_change=True,  # options may be others after resuming
        )
        # Its own steps may not go back, as iterations do after resuming.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def _log(
        self, iteration: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        shown = {name: self._module.Image(picture) for name, picture in pictures.items()}
        self._run.log({"iteration": iteration, **scalars, **shown})

    def _end(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "FINISHED" else 1)


class MLflowWriter(TrackingWriter):
    """MLflow; where to, ``MLFLOW_TRACKING_URI`` says: a server, ``sqlite:///FILE`` or a folder."""

    package = "mlflow"
    AT_ONCE = 100  # parameters; of metrics it takes more

    def _begin(self, run_id: str | None) -> str:
        # By its own default 7, for minutes; meanwhile the training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        self._client = self._module.MlflowClient()
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        experiment = self._client.get_experiment_by_name(self._project)
        number = (
            self._client.create_experiment(self._project)
            if experiment is None
            else experiment.experiment_id
        )
        run_id = self._client.create_run(number, run_name=self._name).info.run_id
        param = self._module.entities.Param
        # 500 characters is what all versions take.
        params = [param(key, str(value)[:500]) for key, value in flat(self._config).items()]
        for k in range(0, len(params), self.AT_ONCE):
            self._client.log_batch(run_id, params=params[k : k + self.AT_ONCE])
        return run_id

    def _log(
        self, iteration: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        now, metric = int(1000 * time.time()), self._module.entities.Metric
        metrics = [metric(_name(k), value, now, iteration) for k, value in scalars.items()]
        for k in range(0, len(metrics), self.AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[k : k + self.AT_ONCE])
        for name, picture in pictures.items():
            self._client.log_image(
                self._run_id, picture, key=_name(name, ascii_only=True), step=iteration
            )

    def _end(self, state: str) -> None:
        self._client.set_terminated(self._run_id, status=state)


WRITERS = {writer.package: writer for writer in (WandbWriter, MLflowWriter)}
"""The values of ``TRACKING.WRITER``, beside none."""


def check_writer(name: str) -> None:
    """
    Args:
        name: a ``TRACKING.WRITER``.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    if name and name not in WRITERS:
        raise UserError(f"TRACKING.WRITER {name!r}: allowed are {['', *WRITERS]}")
    if name and not _is_installed(name):
        raise UserError(f"TRACKING.WRITER {name}: {name} is not installed: pip install {name}")


def build_tracking_writer(cfg: CfgNode) -> TrackingWriter | None:
    """That of ``TRACKING``; None where ``TRACKING.WRITER`` names none.

    Raises:
        UserError: see :func:`check_writer`.
    """
    tracking = cfg.TRACKING
    check_writer(tracking.WRITER)
    if not tracking.WRITER:
        return None
    return WRITERS[tracking.WRITER](
        folder=cfg.OUTPUT_DIR,
        project=tracking.PROJECT,
        name=tracking.NAME or Path(cfg.OUTPUT_DIR).resolve().name,
        config=yaml.safe_load(cfg.dump()),
    )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name has none


def _as_bytes(picture: np.ndarray | torch.Tensor) -> np.ndarray:
    """From an image as ``put_image`` takes it, (3, H, W), to (H, W, 3) uint8."""
    array = picture.cpu().numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    if array.dtype != np.uint8:
        array = (255 * array.clip(0, 1)).round().astype(np.uint8)
    return array.transpose(1, 2, 0)


def _name(name: str, *, ascii_only: bool = False) -> str:
    """A name that MLflow takes, a tidy path: names of classes may have other characters."""
    return posixpath.normpath(re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII if ascii_only else 0))


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
