"""What all evaluators do alike: images come one by one, in one process or several."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..errors import UserError

ImageResult = TypeVar("ImageResult")
Evaluator = TypeVar("Evaluator", bound="ImageEvaluator")
Scores = dict[str, dict[str, float]]
"""Task, such as ``"sem_seg"``, to metric to value."""


class ImageEvaluator(DatasetEvaluator, ABC, Generic[ImageResult]):
    """Keeps a result of each image, and makes scores of the results of all images.

    An image that comes twice, in one process or in two, counts once. Subclasses say which output
    of the model they read, what they keep of an image (:meth:`evaluate_image`), and what they make
    of it all (:meth:`summarize`).
    """

    output_key: ClassVar[str]
    """The model's output that is evaluated."""
    scores_intervals: bool = False
    """Whether the ends of :meth:`intervals` are among the scores, as ``<metric>_low``, ``_high``.
    """

    def __init__(self, *, distributed: bool = True) -> None:
        """
        Args:
            distributed: gather the results of all processes; otherwise each evaluates its own.
        """
        self._distributed = distributed
        self.reset()

    @classmethod
    def from_dataset(
        cls: type[Evaluator], dataset_name: str, *, distributed: bool = True
    ) -> Evaluator:
        """The evaluator of a registered dataset, from its metadata."""
        arguments = cls.dataset_arguments(MetadataCatalog.get(dataset_name))
        return cls(**arguments, distributed=distributed)

    @classmethod
    def dataset_arguments(cls, metadata: Metadata) -> dict[str, Any]:
        """The constructor's arguments for a dataset, without ``distributed``."""
        raise NotImplementedError

    @abstractmethod
    def evaluate_image(
        self, record: Mapping[str, Any], prediction: Any, source: str
    ) -> ImageResult:
        """What is kept of an image; must be picklable.

        Args:
            record: its dataset dict.
            prediction: what :meth:`read` returns, by default the model's output ``output_key``.
            source: what to call the prediction in errors.
        """

    @abstractmethod
    def summarize(self, images: Mapping[tuple[Hashable, str], ImageResult]) -> Scores | None:
        """The scores of all images, by ``image_id`` (None where there is none) and file name, in
        the order of these."""

    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Where the scores of other images of that kind would lie: 95 % intervals (low, high), by
        task and metric; after :meth:`evaluate`, in the main process. None by default."""
        return {}

    def reset(self) -> None:
        self._images: dict[tuple[Hashable, str], ImageResult] = {}
        self.images: dict[tuple[Hashable, str], ImageResult] = {}
        self.scores: Scores = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Evaluate some images, each by itself.

        Args:
            inputs: dataset dicts, with ``file_name`` and what :meth:`evaluate_image` names.
            outputs: the model's outputs, dicts with ``output_key``, on any device.

        Raises:
            UserError: an output is missing, or see :meth:`evaluate_image`.
        """
        for record, output in zip(inputs, outputs, strict=True):
            # Image ids of datasets evaluated together may coincide, their files do not.
            key = record.get("image_id"), record["file_name"]
            if key in self._images:
                continue
            source = f"the prediction for {record['file_name']}"
            if self.output_key not in output:
                raise UserError(f"{source} has no {self.output_key}, only {sorted(output)}")
            self._images[key] = self.evaluate_image(record, self.read(output), source)

    def read(self, output: Mapping[str, Any]) -> Any:
        """What :meth:`evaluate_image` gets of the model's output for an image."""
        return output[self.output_key]

    def found(self, record: Mapping[str, Any]) -> ImageResult | None:
        """What is kept of an image that this process has evaluated; None if it has not."""
        return self._images.get((record.get("image_id"), record["file_name"]))

    def evaluate(self) -> Scores | None:
        """What :meth:`summarize` makes of all images; None in all processes but the first.

        There ``images`` and ``scores`` keep what all processes found, and what is made of it.
        """
        parts = [self._images]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(self._images)
            if not comm.is_main_process():
                return None
        images = {key: image for part in parts for key, image in part.items()}
        self.images = dict(sorted(images.items(), key=_order))
        scores = self.summarize(self.images)
        self.scores = scores or {}
        if self.scores_intervals and scores:
            for task, metrics in self.intervals().items():
                for metric, ends in metrics.items():
                    pairs = zip(("low", "high"), ends, strict=True)
                    scores[task] |= {f"{metric}_{which}": end for which, end in pairs}
        return scores


def _order(item: tuple[tuple[Hashable, str], Any]) -> tuple[str, Hashable, str]:
    """Ids may be numbers, strings or, of Detectron2's own datasets, None; and some of each."""
    (image_id, file_name), _ = item
    return type(image_id).__name__, image_id, file_name
