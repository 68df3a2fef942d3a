"""Several evaluators at once, of which one that fails costs the others nothing."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from ..errors import UserError

logger = logging.getLogger(__name__)


class EvaluationUserError(UserError):
    """Evaluators failed; ``results`` are those of the others."""

    def __init__(self, message: str, results: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.results = results or {}


class IndependentEvaluators(DatasetEvaluators):
    """Detectron2's ``DatasetEvaluators``, without an evaluator from its first exception on.

    The exception is logged, and :attr:`failures` has it. Processes agree on who failed before any
    evaluator gathers its results: none waits for one that is out elsewhere.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        super().__init__(list(evaluators))
        self._failures: dict[int, str] = {}

    @property
    def failures(self) -> list[str]:
        """A line ``<evaluator>: <reason>`` for each that failed since :meth:`reset`; after
        :meth:`evaluate` the same in all processes."""
        return [message for _, message in sorted(self._failures.items())]

    def reset(self) -> None:
        self._failures = {}
        for number, evaluator in enumerate(self._evaluators):
            self._guarded(number, evaluator.reset)

    def process(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        for number, evaluator in enumerate(self._evaluators):
            self._guarded(number, evaluator.process, inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """The results of the evaluators that did not fail; in the main process alone, as theirs."""
        self._agree()
        results: dict[str, Any] = {}
        for number, evaluator in enumerate(self._evaluators):
            self._guarded(number, _add_results, evaluator, results)
        self._agree()
        return results

    def _guarded(self, number: int, function: Callable[..., None], *arguments: Any) -> None:
        """Call it, if the evaluator of that number did not fail yet."""
        if number in self._failures:
            return
        try:
            function(*arguments)
        except Exception as error:
            self._fail(number, error)

    def _fail(self, number: int, error: Exception) -> None:
        expected = isinstance(error, UserError)  # its line says all
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        line = f"{type(self._evaluators[number]).__name__}: {' '.join(reason.split())}"
        self._failures[number] = line
        left = len(self._evaluators) - len(self._failures)
        others = "the others go on" if left else "none is left"
        logger.error("%s; it is left out, %s", line, others, exc_info=not expected)

    def _agree(self) -> None:
        for failures in reversed(comm.all_gather(self._failures)):
            self._failures = {**self._failures, **failures}  # the first process's line, if any


def _add_results(evaluator: DatasetEvaluator, results: dict[str, Any]) -> None:
    """Evaluate, and in the main process add the results to those of others."""
    found = evaluator.evaluate()
    if found is None or not comm.is_main_process():
        return
    if taken := results.keys() & found.keys():
        raise UserError(f"another evaluator has results of {min(taken)} too")
    results.update(found)
