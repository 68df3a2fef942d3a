"""The registries of evaluators, filled by ``build.py`` and ``detectron2_evaluators.py``."""

from collections.abc import Callable, Collection

from detectron2.evaluation import DatasetEvaluator
from fvcore.common.registry import Registry

EvaluatorBuilder = Callable[[str, str], DatasetEvaluator]
"""Called as ``build(dataset_name, output_folder)``; has the attributes of :func:`needs`."""

EVALUATOR_REGISTRY = Registry("EVALUATORS")
EVALUATOR_REGISTRY.__doc__ = """
Builders of the extension's evaluators. A dataset's ``evaluators`` metadata lists the names of
those it is evaluated with.
"""

DETECTRON2_EVALUATOR_REGISTRY = Registry("DETECTRON2_EVALUATORS")
DETECTRON2_EVALUATOR_REGISTRY.__doc__ = """
Builders of Detectron2's own evaluators, under the names of those that they stand in for.
"""


def needs(
    output: str,
    *,
    module: str | None = None,
    attribute: str | None = None,
    install: str | None = None,
    scores: Collection[str] | None = None,
) -> Callable[[EvaluatorBuilder], EvaluatorBuilder]:
    """Decorate a builder with what its evaluator needs.

    Args:
        output: the model output, one of ``OUTPUTS``, that it reads; where the model does not
            return that, the evaluator is left out.
        module: a module that must be importable, beyond this package's requirements.
        attribute: what it must have, by which its version is told.
        install: how to get it, for the error where it is missing.
        scores: the names of what it finds, "task/metric"; "task/metric-" for one of each class.
            None if they are not known before.
    """

    def mark(build: EvaluatorBuilder) -> EvaluatorBuilder:
        build.needs, build.module, build.attribute = output, module, attribute
        build.install, build.scores = install, scores
        return build

    return mark
