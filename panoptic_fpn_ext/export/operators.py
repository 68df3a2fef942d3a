"""Operators that PyTorch's exporter lacks or writes otherwise than they are needed.

Each computes in PyTorch what its ONNX node computes. That is what an export is traced with.
"""

from typing import Any

import torch
from torchvision.ops import batched_nms

NO_CANDIDATE = -1e30  # the score of a box in the classes that it is not of


def _constant(g: Any, value: Any, dtype: torch.dtype = torch.int64) -> Any:
    return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))


class NMS(torch.autograd.Function):
    """Non-maximum suppression within each class; what is kept, by descending score.

    Not by moving the boxes of each class to a place of their own, as torchvision writes it: that
    rounds coordinates, and has no maximum where there are no boxes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        classes: torch.Tensor,
        threshold: torch.Tensor,
        num_classes: int,
        limit: int,
    ) -> torch.Tensor:
        """
        Args:
            boxes: (N, 4) x0, y0, x1, y1.
            scores: (N,).
            classes: (N,) int64, less than ``num_classes``.
            threshold: (1,) the IoU above which the lower score is dropped.
            num_classes: see above.
            limit: how many of a class are kept at most.

        Returns:
            (M,) int64 indices.
        """
        return batched_nms(boxes, scores, classes, float(threshold))

    @staticmethod
    def symbolic(
        g: Any, boxes: Any, scores: Any, classes: Any, threshold: Any, num_classes: int, limit: int
    ) -> Any:
        numbers = _constant(g, [[k] for k in range(num_classes)])
        is_of_class = g.op("Equal", numbers, g.op("Unsqueeze", classes, _constant(g, [0])))
        of_class = g.op("Where", is_of_class, scores, _constant(g, NO_CANDIDATE, torch.float32))
        kept = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, _constant(g, [0])),
            g.op("Unsqueeze", of_class, _constant(g, [0])),
            _constant(g, [limit]),
            threshold,
            _constant(g, [NO_CANDIDATE], torch.float32),
        )
        bounds = (_constant(g, value) for value in ([2], [3], [1]))
        indices = g.op("Squeeze", g.op("Slice", kept, *bounds), _constant(g, [1]))
        kept_scores = g.op("Gather", scores, indices)
        _, order = g.op("TopK", kept_scores, g.op("Shape", kept_scores), outputs=2)
        return g.op("Gather", indices, order).setType(classes.type().with_sizes([None]))


def kept_by_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    threshold: torch.Tensor,
    num_classes: int,
    limit: int,
) -> torch.Tensor:
    """See :class:`NMS`; for TorchScript as a loop over the classes."""
    if torch.onnx.is_in_onnx_export():
        return NMS.apply(boxes, scores, classes, threshold, num_classes, limit)
    return _kept_class_by_class(boxes, scores, classes, threshold)


@torch.jit.script_if_tracing
def _kept_class_by_class(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for number in torch.unique(classes):
        places = (classes == number).nonzero()[:, 0]
        best = torch.ops.torchvision.nms(boxes[places], scores[places], float(threshold))
        kept[places[best]] = True
    indices = kept.nonzero()[:, 0]
    return indices[scores[indices].argsort(descending=True)]
