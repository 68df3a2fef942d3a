"""Whether an exported model says the same as the model in PyTorch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

MIN_LABELS = 0.999
MAX_BOX = 1e-2  # pixels
MAX_SCORE = 1e-4

Outputs = Mapping[str, np.ndarray]


@dataclass
class Agreement:
    """Of the outputs for one image.

    Attributes:
        labels: share of pixels with the same label, the least of the maps and masks.
        categories: share of pixels of the same category in ``panoptic_seg`` (without it, in
            ``sem_seg``), whichever segments they are of.
        same_segments: the same segments and instances: as many, of the same categories in the same
            order.
        box: greatest difference of box corners, in pixels.
        score: greatest difference of scores.
        instances: how many there are.
    """

    labels: float = 1.0
    categories: float = 1.0
    same_segments: bool = True
    box: float = 0.0
    score: float = 0.0
    instances: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.faults


def compared(expected: Outputs, found: Outputs) -> Agreement:
    """How well outputs of an image agree.

    Args:
        expected, found: as :func:`outputs_of` has them.
    """
    agreement = Agreement()
    if set(expected) != set(found):
        agreement.faults.append(f"outputs {sorted(found)}, not {sorted(expected)}")
        return agreement
    exact = ("classes", "segment_id", "segment_category_id", "segment_isthing")
    for name in exact:
        if name in expected and not np.array_equal(expected[name], found[name]):
            agreement.same_segments = False
    agreement.instances = len(expected.get("scores", expected.get("segment_isthing", ())))
    if not agreement.same_segments:
        agreement.faults.append("other segments")
    for name in ("panoptic_seg", "sem_seg", "masks"):
        if name not in expected:
            continue
        if expected[name].shape != found[name].shape:
            agreement.labels = 0.0
        elif expected[name].size:
            share = float((expected[name] == found[name]).mean())
            agreement.labels = min(agreement.labels, share)
    maps = [_categories(outputs) for outputs in (expected, found)]
    if maps[0] is not None and maps[0].size:
        agreement.categories = float((maps[0] == maps[1]).mean())
    if agreement.labels < MIN_LABELS:
        agreement.faults.append(f"{agreement.labels:.2%} of the labels")
    agreement.box = _greatest(expected, found, "boxes")
    if agreement.box > MAX_BOX:
        agreement.faults.append(f"boxes {agreement.box:.3f} pixels off")
    agreement.score = max(_greatest(expected, found, n) for n in ("scores", "segment_score"))
    if agreement.score > MAX_SCORE:
        agreement.faults.append(f"scores {agreement.score:.6f} off")
    return agreement


def _categories(outputs: Outputs) -> np.ndarray | None:
    """A number for the category of each pixel."""
    if "panoptic_seg" not in outputs:
        return outputs.get("sem_seg")
    of_segments = 2 * outputs["segment_category_id"] + outputs["segment_isthing"]
    return np.concatenate([[-1], of_segments])[outputs["panoptic_seg"]]


def _greatest(expected: Outputs, found: Outputs, name: str) -> float:
    if name not in expected or not expected[name].size:
        return 0.0
    if expected[name].shape != found[name].shape:
        return float("inf")
    return float(np.abs(expected[name] - found[name]).max())


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The outputs of a model in PyTorch under the names of the exported one.

    Args:
        model: one of this package.
        inputs: ``image`` (C, H, W), ``height`` and ``width``.
    """
    (output,) = model([inputs])
    found: dict[str, torch.Tensor | np.ndarray] = {}
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        ids = ids.cpu().numpy()
        counts = np.bincount(ids.reshape(-1), minlength=len(segments) + 1)
        found |= {
            "panoptic_seg": ids,
            "segment_id": np.array([s["id"] for s in segments], np.int32),
            "segment_category_id": np.array([s["category_id"] for s in segments], np.int32),
            "segment_isthing": np.array([s["isthing"] for s in segments], bool),
            "segment_score": np.array([s.get("score", 1.0) for s in segments], np.float32),
            "segment_area": np.array([counts[s["id"]] for s in segments], np.int64),
            "segment_instance_id": np.array([s.get("instance_id", -1) for s in segments], np.int32),
        }
    if "instances" in output:
        instances = output["instances"]
        found |= {
            "boxes": instances.pred_boxes.tensor,
            "scores": instances.scores,
            "classes": instances.pred_classes.int(),
        }
        if instances.has("pred_masks"):
            found["masks"] = instances.pred_masks
    if "sem_seg" in output:
        found["sem_seg"] = output["sem_seg"].argmax(dim=0).int()
    return {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


Runner = Callable[[np.ndarray], Outputs]
