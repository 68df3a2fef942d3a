"""report.html: one file that shows how good a network is on a dataset, and why.

Nothing but the few images shown is read again. Of each image a small index map of the prediction is
kept, some kilobytes.
"""

import base64
import json
import logging
import math
import os
import platform
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import detectron2
import jinja2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import Metadata, MetadataCatalog

from ..data.label_space import thing_sem_seg_ids, with_isthing
from ..data.mapper import read_image
from .analysis import IGNORED, MATCH, PanopticImage
from .base import ImageEvaluator
from .instance_ap import InstanceAPEvaluator
from .panoptic_errors import KINDS
from .panoptic_maps import read_ground_truth, segment_places
from .panoptic_matching import Category
from .panoptic_quality import PanopticQualityEvaluator
from .sem_seg_iou import SemSegIoUEvaluator

logger = logging.getLogger(__name__)

LONG_SIDE = 480  # of pictures, in pixels
WORST, BEST, RANDOM, OF_EACH = 12, 6, 6, 2
MOST_IMAGES = 80
CONFUSIONS = 25
FEW_IMAGES = 1000  # with more the interval of AP takes minutes: TEST.INTERVALS asks for it

KIND_TEXTS = {
    "class": ("Wrong class", "right outline, another class"),
    "thing_stuff": ("Thing or stuff", "right outline, a thing taken for stuff or the reverse"),
    "split": ("Split", "one segment predicted as several"),
    "merged": ("Merged", "several segments predicted as one"),
    "outline": ("Poor outline", "right class, IoU 0.1 to 0.5"),
    "missed": ("Missed", "no prediction comes near"),
    "made_up": ("Made up", "a prediction of nothing"),
    "perfect_outlines": ("Outlines (SQ)", "what is found had IoU 1"),
}
HEADLINES = (
    ("panoptic_seg", "PQ", "PQ"),
    ("panoptic_seg", "PQ_th", "PQ things"),
    ("panoptic_seg", "PQ_st", "PQ stuff"),
    ("sem_seg", "mIoU", "mIoU"),
    ("segm", "AP", "mask AP"),
    ("bbox", "AP", "box AP"),
)


@dataclass
class ImagePrediction:
    """What is kept of an image.

    Attributes:
        record: its dataset dict, without what is not drawn.
        png: of the map, 8-bit, which segment, from 1, each pixel belongs to; 0 is void.
        scores: of the segments, by id; of stuff None.
    """

    record: dict[str, Any]
    png: bytes
    scores: dict[int, float | None]


class ReportWriter(ImageEvaluator[ImagePrediction]):
    """Writes ``report.html`` and ``report.json`` when other evaluators have their scores.

    It must see the images after them and be evaluated after them. Works in several processes, of
    which the first one writes; it reads the images that it shows.
    """

    output_key = "panoptic_seg"

    def __init__(
        self,
        *,
        folder: str | os.PathLike,
        dataset_name: str,
        evaluators: Sequence[ImageEvaluator],
        cfg: CfgNode | None = None,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            folder: where to write.
            dataset_name: what is evaluated; its metadata has names and colours.
            evaluators: those whose scores are shown; among them a
                :class:`PanopticQualityEvaluator`.
            cfg: the config to show.
            distributed: gather from all processes; otherwise each writes its own.
        """
        super().__init__(distributed=distributed)
        self._folder = Path(folder)
        self._name = dataset_name
        self._evaluators = list(evaluators)
        self._cfg = cfg

    def reset(self) -> None:
        super().reset()
        self._began = time.time()

    def evaluate_image(
        self,
        record: Mapping[str, Any],
        prediction: tuple[torch.Tensor | np.ndarray, Sequence[Mapping[str, Any]]],
        source: str,
    ) -> ImagePrediction:
        """A small map of an image's prediction.

        Args:
            record: dataset dict with ``file_name``, ``pan_seg_file_name`` and ``segments_info``.
            prediction: ``panoptic_seg``, see :class:`PanopticQualityEvaluator`.
        """
        ids, segments = prediction
        ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
        keys = ("file_name", "pan_seg_file_name", "segments_info", "height", "width", "image_id")
        return ImagePrediction(
            {key: record[key] for key in keys if key in record},
            _index_png(ids, [s["id"] for s in segments]),
            {int(s["id"]): _number(s.get("score")) for s in segments},
        )

    def summarize(self, images: Mapping[tuple[Hashable, str], ImagePrediction]) -> None:
        """Write both files."""
        panoptic = next(e for e in self._evaluators if isinstance(e, PanopticQualityEvaluator))
        if not panoptic.images:
            logger.warning("No panoptic quality, so no report is written")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        data = self._facts(panoptic)
        content = {
            **data,
            "categories": [list(category) for category in panoptic.names],
            "image_counts": _image_counts(panoptic),
        }
        (self._folder / "report.json").write_text(json.dumps(_json(content)), "utf-8")
        data["groups"], data["pictures"] = self._pictures(panoptic, images)
        path = self._folder / "report.html"
        unfinished = path.with_name(".report.html.unfinished")
        unfinished.write_text(render(data), "utf-8")
        unfinished.replace(path)
        logger.info("Report written to %s (%.1f MB)", path, path.stat().st_size / 1e6)

    def _facts(self, panoptic: PanopticQualityEvaluator) -> dict[str, Any]:
        """All that is shown but pictures."""
        scores: dict[str, dict[str, float]] = {}
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for evaluator in self._evaluators:
            scores |= evaluator.scores
            is_slow = isinstance(evaluator, InstanceAPEvaluator) and (
                len(evaluator.images) > FEW_IMAGES and not evaluator.scores_intervals
            )
            if evaluator.images and not is_slow:
                intervals |= evaluator.intervals()
        result = panoptic.analysis()
        for entry in result["classes"]:
            for key, task, metric in (("IoU", "sem_seg", "IoU"), ("AP", "segm", "AP")):
                own = metric == "IoU" or entry["isthing"]
                entry[key] = scores.get(task, {}).get(f"{metric}-{entry['name']}") if own else None
        return {
            "dataset": self._name,
            "scores": scores,
            "headlines": [
                {
                    "label": label,
                    "value": scores[task][metric],
                    "interval": intervals.get(task, {}).get(metric),
                }
                for task, metric, label in HEADLINES
                if metric in scores.get(task, {})
            ],
            "analysis": result,
            "confusions": self._confusions(),
            "run": self._run(),
            "config": _differences(self._cfg) if self._cfg else [],
        }

    def _confusions(self) -> list[dict[str, Any]]:
        """The pairs of semantic classes with most wrong pixels."""
        semantic = [e for e in self._evaluators if isinstance(e, SemSegIoUEvaluator) and e.images]
        if not semantic:
            return []
        names = list(MetadataCatalog.get(self._name).stuff_classes)
        confusion = semantic[0].confusion()
        wrong = confusion - np.diag(np.diagonal(confusion))
        order = np.argsort(-wrong, axis=None)[:CONFUSIONS]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            {
                "true": names[a],
                "predicted": names[b],
                "share_of_true": 100 * wrong[a, b] / confusion[a].sum(),
                "share_of_wrong": 100 * wrong[a, b] / wrong.sum(),
            }
            for a, b in pairs
            if wrong[a, b]
        ]

    def _run(self) -> dict[str, str]:
        device = self._cfg.MODEL.DEVICE if self._cfg else "unknown"
        if device.startswith("cuda") and torch.cuda.is_available():
            device += f", {torch.cuda.get_device_name()}"
        from .. import __version__

        return {
            "Command": shlex.join(["python", *map(os.path.basename, sys.argv[:1]), *sys.argv[1:]]),
            "Weights": self._cfg.MODEL.WEIGHTS if self._cfg else "",
            "Written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "Evaluation took": f"{time.time() - self._began:.0f} s",
            "Device": device,
            "Versions": f"panoptic_fpn_ext {__version__}, Detectron2 {detectron2.__version__}, "
            f"PyTorch {torch.__version__}, Python {platform.python_version()}",
        }

    # Pictures

    def _pictures(
        self,
        panoptic: PanopticQualityEvaluator,
        images: Mapping[tuple[Hashable, str], ImagePrediction],
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Which images are shown under which heading, and what is shown of each."""
        chosen = _chosen(panoptic)
        places: dict[Any, int] = {}
        groups = []
        for title, keys in chosen:
            keys = [key for key in keys if key in images]
            for key in keys:
                if len(places) < MOST_IMAGES:
                    places.setdefault(key, len(places))
            group = [places[key] for key in keys if key in places]
            if group:
                groups.append({"title": title, "images": group})
        metadata = MetadataCatalog.get(self._name)
        return groups, [
            _picture(images[k], panoptic.images[k], panoptic.names, metadata) for k in places
        ]


def _chosen(panoptic: PanopticQualityEvaluator) -> list[tuple[str, list[Any]]]:
    """Headings, and the images under each."""
    found = panoptic.images
    ranked = sorted(
        (k for k in found if not math.isnan(found[k].pq())), key=lambda k: found[k].pq()
    )
    chosen = [
        (f"Worst {WORST} by PQ of the image", ranked[:WORST]),
        (f"Best {BEST} by PQ of the image", ranked[::-1][:BEST]),
        (f"Random {RANDOM}", random.Random(0).sample(ranked, min(RANDOM, len(ranked)))),
    ]

    # Of each kind and category how many errors which images have.
    counts: dict[Any, Counter] = defaultdict(Counter)
    for key, image in found.items():
        for segment in image.segments:
            if segment.state not in (MATCH, IGNORED):
                counts[segment.state][key] += 1
                counts[segment.category][key] += 1
    titles = {kind: f"Most errors: {KIND_TEXTS[kind][0].lower()}" for kind in KINDS}
    titles |= {category: f"Worst of class: {name}" for category, name in panoptic.names.items()}
    for what, title in titles.items():
        chosen.append((title, [key for key, _ in counts[what].most_common(OF_EACH)]))
    return chosen


def _picture(
    prediction: ImagePrediction,
    found: PanopticImage,
    names: Mapping[Category, str],
    metadata: Metadata,
) -> dict[str, Any]:
    """What is shown of an image: three data URLs, and the segments of both maps in their order."""
    from ..visualization import agreeing_colors  # it draws what evaluators keep: they come first

    record = prediction.record
    image = cv2.cvtColor(read_image(record, "RGB"), cv2.COLOR_RGB2BGR)
    size = _small(image.shape[:2])
    _, jpeg = cv2.imencode(
        ".jpg",
        cv2.resize(image, size, interpolation=cv2.INTER_AREA),
        [cv2.IMWRITE_JPEG_QUALITY, 82],
    )
    gt_ids = read_ground_truth(record["pan_seg_file_name"])
    truth = with_isthing(record["segments_info"], thing_sem_seg_ids(metadata))
    png = _index_png(gt_ids, [s["id"] for s in truth])
    ours = [s for s in found.segments if not s.true]
    theirs = {s.id: s for s in found.segments if s.true}
    numbers = cv2.imdecode(np.frombuffer(prediction.png, np.uint8), cv2.IMREAD_UNCHANGED)
    true_numbers = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    infos = [
        [
            {"id": k, "isthing": s.category[0], "category_id": s.category[1]}
            for k, s in enumerate(segments, 1)
        ]
        for segments in (ours, [theirs[s["id"]] for s in truth])
    ]
    colors = agreeing_colors(
        (numbers.astype(int), infos[0]), (true_numbers.astype(int), infos[1]), metadata
    )

    def told(segment: Any, color: tuple[int, ...], score: float | None) -> list[Any]:
        return [names[segment.category], segment.state, round(segment.iou, 3), score, list(color)]

    return {
        "name": os.path.basename(record["file_name"]),
        "pq": found.pq(),
        "size": size,
        "image": _url("jpeg", jpeg.tobytes()),
        "prediction": _url("png", prediction.png),
        "truth": _url("png", png),
        "predicted_segments": [
            told(s, colors[0][k], prediction.scores.get(s.id)) for k, s in enumerate(ours, 1)
        ],
        "true_segments": [
            told(theirs[s["id"]], colors[1][k], None) for k, s in enumerate(truth, 1)
        ],
    }


def _small(shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the picture of an image (H, W)."""
    scale = min(1.0, LONG_SIDE / max(shape))
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _index_png(ids: np.ndarray, segment_ids: Sequence[int]) -> bytes:
    """A small map of which segment, from 1, pixels belong to: an 8-bit PNG.

    Segments beyond the 255th are void in it.
    """
    (height, width), (small_width, small_height) = ids.shape, _small(ids.shape)
    rows = (2 * np.arange(small_height) + 1) * height // (2 * small_height)
    columns = (2 * np.arange(small_width) + 1) * width // (2 * small_width)
    places = segment_places(ids[rows][:, columns], segment_ids)
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, png = cv2.imencode(".png", np.where(places < 256, places, 0).astype(np.uint8), fast)
    return png.tobytes()


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _image_counts(panoptic: PanopticQualityEvaluator) -> list[list[Any]]:
    """Of each image its name, and for each of its categories: place, sum of IoUs, matches, false
    positives, false negatives."""
    place = {category: k for k, category in enumerate(panoptic.names)}
    files = [file_name for _, file_name in panoptic.images]
    root = os.path.commonpath([os.path.dirname(name) for name in files])
    return [
        [
            os.path.relpath(file_name, root),
            [
                [place[c], math.fsum(m.ious), len(m.ious), m.false_positives, m.false_negatives]
                for c, m in image.matches.items()
            ],
        ]
        for (_, file_name), image in panoptic.images.items()
    ]


def _differences(cfg: CfgNode) -> list[tuple[str, str, str]]:
    """Keys of a config that differ from the defaults: key, value, default."""
    from ..config import add_panoptic_fpn_config

    defaults = get_cfg()
    add_panoptic_fpn_config(defaults)
    theirs = _flat(defaults)
    return [
        (key, str(value), str(theirs.get(key, "")))
        for key, value in _flat(cfg).items()
        if key not in theirs or theirs[key] != value
    ]


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _number(value: Any) -> float | None:
    return None if value is None else round(float(value), 3)


def _json(value: Any) -> Any:
    """The same with None for nan, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else round(float(value), 6)
    return int(value) if isinstance(value, np.integer) else value


def render(data: Mapping[str, Any]) -> str:
    """The page: HTML with all it needs in it."""
    page = files(__package__) / "page"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((page / "report.html.jinja").read_text("utf-8"))
    pictures = json.dumps(_json(data["pictures"])).replace("<", r"\u003c")
    groups = json.dumps(data["groups"]).replace("<", r"\u003c")
    return template.render(
        data=_json({k: v for k, v in data.items() if k not in ("pictures", "groups")}),
        kinds=KIND_TEXTS,
        pictures=pictures,
        groups=groups,
        style=(page / "report.css").read_text("utf-8"),
        script=(page / "report.js").read_text("utf-8"),
    )
