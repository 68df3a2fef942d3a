"""PQ, mIoU and AP of made-up predictions: our evaluators against Detectron2's."""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cityscapesscripts.evaluation import evalPanopticSemanticLabeling
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from PIL import Image

from panoptic_fpn_ext.evaluation import (
    InstanceAPEvaluator,
    PanopticQualityEvaluator,
    SemSegIoUEvaluator,
)

from .dataset import make_dataset, rgb
from .frame import by_turns
from .results import Comparison, Peer, Times

Result = Mapping[str, float]
Builder = Callable[[str], DatasetEvaluator]


def evaluation(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """PQ, mIoU and AP of made-up predictions, each alone and all three together.

    Each evaluator is built, given the predictions image by image and asked for its result. Of
    what Detectron2 wants converted before (semantic PNGs, instance annotations), nothing is timed.
    """
    comparisons = []
    for height, width in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            name = f"benchmark_{height}x{width}"
            outputs = make_dataset(name, Path(folder), height, width, args.images)
            records = DatasetCatalog.get(name)
            for what, builders in EVALUATORS.items():
                ours, detectron2 = (
                    functools.partial(evaluate, build, name, records, outputs) for build in builders
                )
                comparisons.append(
                    compare(
                        *(what, f"{height}x{width}", ours, detectron2),
                        num_images=len(records),
                        rounds=args.rounds,
                    )
                )
    return comparisons, []


def compare(
    what: str,
    size: str,
    ours: Callable[[], Result],
    detectron2: Callable[[], Result],
    *,
    num_images: int,
    rounds: int,
) -> Comparison:
    """Run both by turns; compare the numbers that both return."""

    def timed(run: Callable[[], Result]) -> tuple[float, Result]:
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result

    runs = [functools.partial(timed, run) for run in (ours, detectron2)]
    first, turns = by_turns(runs, rounds)
    ours_ms, detectron2_ms = (Times.of([s for s, _ in turn], num_images) for turn in turns)
    return Comparison(
        what=what,
        size=size,
        ours_ms=ours_ms,
        detectron2_ms=detectron2_ms,
        same_answer=same(*(result for _, result in first)),
    )


def same(a: Result, b: Result) -> bool:
    """Whether the numbers under the keys of both, at least one, differ by less than 1e-9."""
    keys = a.keys() & b.keys()
    return bool(keys) and all(
        math.isclose(a[key], b[key], rel_tol=0, abs_tol=1e-9)
        or (math.isnan(a[key]) and math.isnan(b[key]))
        for key in keys
    )


def evaluate(
    build: Builder,
    dataset_name: str,
    records: Iterable[dict],
    outputs: Iterable[dict],
) -> dict[str, float]:
    """The results of an evaluator, flat."""
    with quiet():
        evaluator = build(dataset_name)
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            # Detectron2's panoptic evaluator changes the segments.
            output = {**output, "panoptic_seg": (ids, copy.deepcopy(segments))}
            evaluator.process([record], [output])
        results = evaluator.evaluate()
    return {f"{task}/{key}": value for task in results for key, value in results[task].items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what evaluators print and NumPy warns of."""
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="ignore"):
        yield


class PanopticAPIEvaluator(DatasetEvaluator):
    """What Detectron2's COCOPanopticEvaluator and panopticapi do, on one core.

    A PNG of each prediction in memory, all of them into a folder in the end, and panopticapi's
    ``pq_compute_single_core``; where panopticapi is not installed, that of cityscapesscripts,
    which is the same algorithm.
    """

    def __init__(self, dataset_name: str) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._category_ids = {
            True: list(self._metadata.thing_dataset_id_to_contiguous_id),
            False: list(self._metadata.stuff_dataset_id_to_contiguous_id),
        }
        try:
            from panopticapi import evaluation as algorithm
        except ImportError:
            algorithm = evalPanopticSemanticLabeling
        self._algorithm = algorithm

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            with io.BytesIO() as file:
                Image.fromarray(rgb(ids.numpy())).save(file, format="PNG")
                png = file.getvalue()
            for segment in segments:
                category_ids = self._category_ids[segment.pop("isthing")]
                segment["category_id"] = category_ids[segment["category_id"]]
            self._predictions.append(
                {
                    "image_id": record["image_id"],
                    "file_name": f"{Path(record['file_name']).stem}.png",
                    "segments_info": segments,
                    "png": png,
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        truth = json.loads(Path(self._metadata.panoptic_json).read_text())
        predictions = {p["image_id"]: p for p in self._predictions}
        pairs = [(a, predictions[a["image_id"]]) for a in truth["annotations"]]
        categories = {category["id"]: category for category in truth["categories"]}
        with tempfile.TemporaryDirectory() as folder:
            for prediction in self._predictions:
                Path(folder, prediction["file_name"]).write_bytes(prediction.pop("png"))
            Path(folder, "predictions.json").write_text(json.dumps(self._predictions))
            counts = self._algorithm.pq_compute_single_core(
                0, pairs, self._metadata.panoptic_root, folder, categories
            )
        result = {}
        for suffix, isthing in (("", None), ("_th", True), ("_st", False)):
            average, _ = counts.pq_average(categories, isthing=isthing)
            result |= {f"{key.upper()}{suffix}": 100 * average[key] for key in ("pq", "sq", "rq")}
        return {"panoptic_seg": result}


def together(*builders: Builder) -> Builder:
    """All of them in one pass over the predictions, as ``--eval-only`` has them."""
    return lambda dataset_name: DatasetEvaluators([build(dataset_name) for build in builders])


EVALUATORS: dict[str, tuple[Builder, ...]] = {
    "PQ": (PanopticQualityEvaluator.from_dataset, PanopticAPIEvaluator),
    "mIoU": (SemSegIoUEvaluator.from_dataset, SemSegEvaluator),
    "box and mask AP": (
        InstanceAPEvaluator.from_dataset,
        functools.partial(COCOEvaluator, use_fast_impl=False),
    ),
}
"""What is evaluated, and how: ours, Detectron2's."""
EVALUATORS["PQ + mIoU + AP"] = tuple(
    together(*builders) for builders in zip(*EVALUATORS.values(), strict=True)
)
