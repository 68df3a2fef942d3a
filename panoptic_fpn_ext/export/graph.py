"""A model as one function of an image, such as can be traced: from pixels to segments.

What depends on the number of boxes or on sizes is written without branches of Python, and merging
as a loop that stays one. The modules of the network are Detectron2's, as they are.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.acceleration import decelerate
from ..modeling.meta_arch import PanopticFPNExt, SemanticFPN, TwoNetworkPanopticFPN
from ..modeling.semantic_head import logits_for_postprocessing
from .operators import kept_by_nms
from .resampling import resized

THRESHOLDS = ("overlap_threshold", "stuff_area_limit", "score_threshold")
"""Inputs beside the image, with the config's values by default."""

_OF_OUTPUT = {
    "panoptic_seg": (
        "panoptic_seg",
        "segment_id",
        "segment_category_id",
        "segment_isthing",
        "segment_score",
        "segment_area",
        "segment_instance_id",
    ),
    "instances": ("boxes", "scores", "classes", "masks"),
    "sem_seg": ("sem_seg",),
}


class Detections(NamedTuple):
    """Instances in an image, by descending score."""

    boxes: torch.Tensor  # (N, 4) x0, y0, x1, y1
    scores: torch.Tensor  # (N,)
    classes: torch.Tensor  # (N,) int64
    probabilities: torch.Tensor | None  # (N, M, M), of the mask over the box


class PanopticGraph(nn.Module):
    """The outputs of a model for one image, as plain tensors.

    Attributes:
        output_names: what :meth:`forward` returns, in order: those of
            ``MODEL.PANOPTIC_FPN.OUTPUTS`` and no others.
        thresholds: its inputs beside the image and their defaults; none without merging.
    """

    def __init__(self, model: nn.Module, *, test_size: tuple[int, int]) -> None:
        """
        Args:
            model: ``PanopticFPNExt``, ``SemanticFPN`` or ``TwoNetworkPanopticFPN``, in inference
                and on the CPU; it is copied.
            test_size: ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``; 0 to leave images as
                they are.
        """
        super().__init__()
        model = decelerate(copy.deepcopy(model))
        self.instance_network, self.semantic_network, self.shares_features = _networks(model)
        self.postprocess = model.postprocess
        self.test_size = test_size
        outputs = self.postprocess.outputs
        self.output_names = [
            name for output in _OF_OUTPUT if output in outputs for name in _OF_OUTPUT[output]
        ]
        if "instances" in outputs and not self._has_masks:
            self.output_names.remove("masks")
        merging = self.postprocess.merging
        values = (
            merging["overlap_threshold"],
            merging["stuff_area_thresh"],
            merging["instances_score_thresh"],
        )
        self.thresholds = dict(zip(THRESHOLDS, map(float, values), strict=True))
        if "panoptic_seg" not in outputs:
            self.thresholds = {}

    @property
    def _has_masks(self) -> bool:
        heads = getattr(self.instance_network, "roi_heads", None)
        return heads is not None and heads.mask_on

    def forward(self, image: torch.Tensor, *thresholds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Args:
            image: (H, W, 3) uint8, channels in the order of ``INPUT.FORMAT``.
            thresholds: those of :data:`THRESHOLDS`, (1,) float64 each.

        Returns:
            Those of :attr:`output_names`.
        """
        size = torch._shape_as_tensor(image)[:2]
        pixels = self._resized(image, size)
        network_size = torch._shape_as_tensor(pixels)[2:]
        results: dict[str, torch.Tensor] = {}
        labels = detections = num_classes = None
        pixels = pixels.float()
        features: Mapping[str, torch.Tensor] | None = None
        if self.postprocess.needs("sem_seg"):
            network = self.semantic_network
            features = network.backbone(_prepared(network, pixels))
            of_branch = _of_branch(network, "semantic", features)
            logits, stride = logits_for_postprocessing(network.sem_seg_head, of_branch)
            num_classes = logits.shape[1]
            labels = upsampled_labels(logits[0], stride, network_size, size)
        if self.postprocess.needs("instances") and self.instance_network is not None:
            network = self.instance_network
            if features is None or not self.shares_features:
                features = network.backbone(_prepared(network, pixels))
            of_branch = _of_branch(network, "instance", features)
            detections = detected(network, of_branch, network_size)
            detections = brought_to(detections, network_size, size)
        if "panoptic_seg" in self.postprocess.outputs:
            results |= merged(detections, labels, int(num_classes), self.postprocess, thresholds)
        if "instances" in self.postprocess.outputs:
            results |= {
                "boxes": detections.boxes,
                "scores": detections.scores,
                "classes": detections.classes.int(),
            }
            if detections.probabilities is not None:
                results["masks"] = pasted(detections, size)
        if "sem_seg" in self.postprocess.outputs:
            results["sem_seg"] = labels.int()
        return tuple(results[name] for name in self.output_names)

    def _resized(self, image: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """(1, 3, H, W) uint8 at test size, as ``ResizeShortestEdge`` chooses it."""
        shortest, longest = self.test_size
        if not shortest:
            return image.permute(2, 0, 1)[None]
        height, width = size.double().unbind()
        scale = shortest / torch.minimum(height, width)
        # One side is exact: it is not computed by a product that may be rounded.
        is_landscape = height < width
        new_height = torch.where(is_landscape, torch.full_like(height, shortest), scale * height)
        new_width = torch.where(is_landscape, scale * width, torch.full_like(height, shortest))
        shrink = longest / torch.maximum(new_height, new_width)
        is_too_long = torch.maximum(new_height, new_width) > longest
        new_size = torch.stack([new_height, new_width])
        new_size = torch.where(is_too_long, new_size * shrink, new_size)
        # Where Detectron2 comes to no row at all, one.
        new_size = (new_size + 0.5).floor().long().clamp(min=1)
        return resized(image, new_size).permute(2, 0, 1)[None]


def _networks(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None, bool]:
    """What finds instances, what labels pixels, and whether both have one backbone."""
    if isinstance(model, TwoNetworkPanopticFPN):
        return model.instance_network, model.semantic_network, False
    if isinstance(model, SemanticFPN):
        return None, model, False
    return (model if model.roi_heads is not None else None), model, True


def _prepared(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalized and padded at the right and at the bottom."""
    x = (pixels - network.pixel_mean) / network.pixel_std
    backbone = network.backbone
    divisor = backbone.size_divisibility
    square = getattr(backbone, "padding_constraints", {}).get("square_size", 0)
    size = torch._shape_as_tensor(x)[2:]
    padded = size if not square else torch.full_like(size, square)
    if divisor > 1:
        padded = (padded + (divisor - 1)) // divisor * divisor
    missing = padded - size
    return F.pad(x, (0, missing[1], 0, missing[0]))


def _of_branch(
    network: nn.Module, task: str, features: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    if isinstance(network, PanopticFPNExt):
        return network._features_for(task, features)
    return features


def upsampled_labels(
    logits: torch.Tensor, stride: int, network_size: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """The class of each pixel, see :func:`panoptic_fpn_ext.layers.resizing.upsampled_labels`.

    Args:
        logits: (C, h, w) of the padded image.
        stride: of them.
        network_size, size: (2,) int64 heights and widths of the network's input without padding
            and of the result.

    Returns:
        (H, W) int64.
    """
    num_inputs = torch._shape_as_tensor(logits)[1:]
    rows, columns = (
        _two_steps(num_inputs[axis], stride, network_size[axis], size[axis]) for axis in (0, 1)
    )
    return (rows @ (logits @ columns.t())).argmax(dim=0)


def _two_steps(
    number: torch.Tensor, stride: int, network_size: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """Both bilinear steps along an axis as one matrix (size, number)."""
    second = _bilinear(size, network_size, network_size.float() / size.float())
    if stride == 1:
        return second if number is network_size else F.pad(second, (0, number - network_size))
    return second @ _bilinear(network_size, number, torch.tensor(1 / stride))


def _bilinear(outputs: torch.Tensor, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights (outputs, inputs), half-pixel centres."""
    position = (torch.arange(outputs) + 0.5) * scale - 0.5
    position = torch.minimum(position.clamp(min=0), (inputs - 1).float())
    return (1 - (position[:, None] - torch.arange(inputs)).abs()).clamp(min=0)


def detected(
    network: nn.Module, features: Mapping[str, torch.Tensor], network_size: torch.Tensor
) -> Detections:
    """Instances in the network's input, after RPN and ROI heads."""
    heads = network.roi_heads
    boxes = proposals(network.proposal_generator, features, network_size)
    inputs = [features[name] for name in heads.box_in_features]
    if isinstance(heads.box_head, nn.ModuleList):
        stages = [*zip(heads.box_head, heads.box_predictor, strict=True)]
    else:
        stages = [(heads.box_head, heads.box_predictor)]
    probabilities: list[torch.Tensor] = []
    for number, (head, predictor) in enumerate(stages):
        if number:
            boxes = _clipped(boxes, network_size)
        predictions = predictor(head(pooled(heads.box_pooler, inputs, boxes)))
        logits, deltas = predictions
        probabilities.append(_probabilities(predictor, logits))
        boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
    scores = sum(probabilities) * (1.0 / len(stages)) if len(stages) > 1 else probabilities[0]
    boxes, scores, classes = _best(predictor, boxes, scores, network_size)
    masks = None
    if heads.mask_on:
        inputs = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(pooled(heads.mask_pooler, inputs, boxes))
        if logits.shape[1] == 1:
            masks = logits[:, 0].sigmoid()
        else:
            place = classes[:, None, None, None].expand(-1, 1, *logits.shape[2:])
            masks = logits.gather(1, place)[:, 0].sigmoid()
    return Detections(boxes, scores, classes, masks)


def _probabilities(predictor: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    if getattr(predictor, "use_sigmoid_ce", False):
        return logits.sigmoid()
    return F.softmax(logits, dim=-1)


def proposals(
    rpn: nn.Module, features: Mapping[str, torch.Tensor], network_size: torch.Tensor
) -> torch.Tensor:
    """(N, 4) boxes, by descending score, see :meth:`LeanRPN.predict_proposals`."""
    levels = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator(levels)
    logits, deltas = rpn.rpn_head(levels)
    boxes, scores, numbers = [], [], []
    for level, of_level in enumerate(zip(anchors, logits, deltas, strict=True)):
        anchor, level_scores, level_deltas = of_level
        level_scores = level_scores[0].permute(1, 2, 0).flatten()
        level_deltas = level_deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
        number = torch._shape_as_tensor(level_scores)[0].clamp(max=rpn.pre_nms_topk[False])
        best, place = level_scores.topk(number)
        boxes.append(rpn.box2box_transform.apply_deltas(level_deltas[place], anchor.tensor[place]))
        scores.append(best)
        numbers.append(torch.full_like(place, level))
    boxes, scores, numbers = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
    finite = (torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores))[:, None]
    boxes = _clipped(boxes, network_size)
    has_area = (boxes[:, 2:] - boxes[:, :2] > rpn.min_box_size).all(dim=1)
    valid = (finite[:, 0] & has_area).nonzero()[:, 0]
    boxes, scores, numbers = boxes[valid], scores[valid], numbers[valid]
    limit = rpn.post_nms_topk[False]
    threshold = torch.tensor([rpn.nms_thresh])
    kept = kept_by_nms(boxes, scores, numbers, threshold, len(levels), limit)[:limit]
    return boxes[kept]


def _best(
    predictor: nn.Module, boxes: torch.Tensor, scores: torch.Tensor, network_size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes (N, 4), scores and classes of detections, see ``fast_rcnn_inference``."""
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    num_classes = predictor.num_classes
    scores = scores[:, :-1]
    candidates = (scores > predictor.test_score_thresh) & finite[:, None]
    rows, classes = candidates.nonzero().unbind(dim=1)
    scores = scores.flatten()[rows * num_classes + classes]
    if boxes.shape[1] == 4:
        boxes = boxes[rows]
    else:
        boxes = boxes.reshape(-1, 4)[rows * num_classes + classes]
    boxes = _clipped(boxes, network_size)
    limit = predictor.test_topk_per_image
    threshold = torch.tensor([predictor.test_nms_thresh])
    most = limit if limit >= 0 else 2**31
    kept = kept_by_nms(boxes, scores, classes, threshold, num_classes, most)
    if limit >= 0:
        kept = kept[:limit]
    return boxes[kept], scores[kept], classes[kept]


def _clipped(boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4) within an image of ``size``, height and width."""
    most = size.to(boxes.dtype).flip(0).repeat(2)
    return torch.minimum(boxes.clamp(min=0), most)


def pooled(pooler: nn.Module, features: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) features of boxes, each of its level, see ``ROIPooler``."""
    regions = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    if len(pooler.level_poolers) == 1:
        return pooler.level_poolers[0](features[0], regions)
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = (pooler.canonical_level + (size / pooler.canonical_box_size + 1e-8).log2()).floor()
    level = level.clamp(min=pooler.min_level, max=pooler.max_level).long() - pooler.min_level
    places = [(level == k).nonzero()[:, 0] for k in range(len(features))]
    parts = [
        level_pooler(feature, regions[place])
        for level_pooler, feature, place in zip(pooler.level_poolers, features, places, strict=True)
    ]
    order = torch.cat(places)
    number = torch.arange(torch._shape_as_tensor(order)[0])
    return torch.cat(parts)[torch.zeros_like(order).scatter(0, order, number)]


def brought_to(
    detections: Detections, network_size: torch.Tensor, size: torch.Tensor
) -> Detections:
    """At the size of the original image, without those whose box has no area there, see
    ``detector_postprocess``."""
    scale = (size.double() / network_size.double()).float().flip(0).repeat(2)
    boxes = _clipped(detections.boxes * scale, size)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
    masks = detections.probabilities
    return Detections(
        boxes[kept],
        detections.scores[kept],
        detections.classes[kept],
        None if masks is None else masks[kept],
    )


def pasted(detections: Detections, size: torch.Tensor) -> torch.Tensor:
    """(N, H, W) bool masks."""
    rows, columns = _sampling(detections, size)
    return rows @ detections.probabilities @ columns.transpose(1, 2) >= 0.5


def _sampling(detections: Detections, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear weights (N, H, M) and (N, W, M) of the values of each box for rows and columns."""
    boxes, number = detections.boxes, detections.probabilities.shape[-1]
    weights = []
    for axis in (1, 0):
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        scale = number / (end - start)
        pixels = torch.arange(size[1 - axis])
        position = pixels * scale + ((0.5 - start) * scale - 0.5)
        weights.append((1 - (position[..., None] - torch.arange(number)).abs()).clamp(min=0))
    return weights[0], weights[1]


@torch.jit.script_if_tracing
def painted(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    windows: torch.Tensor,
    empty: torch.Tensor,
    overlap_threshold: torch.Tensor,
) -> torch.Tensor:
    """Masks painted one after the other, each where nothing is yet.

    Args:
        probabilities: (N, M, M) of each mask over its box.
        boxes: (N, 4).
        windows: (N, 4) int64, x0, y0, x1, y1: no mask has pixels outside of its own.
        empty: (H, W) int32 zeros.
        overlap_threshold: (1,) float64.

    Returns:
        (H, W) int32: number of the mask from 1, 0 where none is. What is dropped has no pixel.
    """
    ids = empty
    number = probabilities.size(1)
    places = torch.arange(number)
    for i in range(probabilities.size(0)):
        window = windows[i]
        x0, y0 = window[0], window[1]
        x1, y1 = window[2], window[3]
        box = boxes[i]
        scale_x = number / (box[2] - box[0])
        scale_y = number / (box[3] - box[1])
        rows = torch.arange(int(y0), int(y1)) * scale_y + ((0.5 - box[1]) * scale_y - 0.5)
        columns = torch.arange(int(x0), int(x1)) * scale_x + ((0.5 - box[0]) * scale_x - 0.5)
        row_weights = (1 - (rows.unsqueeze(1) - places).abs()).clamp(min=0)
        column_weights = (1 - (columns.unsqueeze(0) - places.unsqueeze(1)).abs()).clamp(min=0)
        mask = row_weights @ probabilities[i] @ column_weights >= 0.5
        above, band, below = ids[: int(y0)], ids[int(y0) : int(y1)], ids[int(y1) :]
        left, taken, right = band[:, : int(x0)], band[:, int(x0) : int(x1)], band[:, int(x1) :]
        area = mask.long().sum()
        visible = mask & (taken == 0)
        visible_area = visible.long().sum()
        hidden = (area - visible_area).double() / area.double()
        accept = (visible_area > 0) & (hidden <= overlap_threshold)
        paint = torch.where(visible & accept, torch.full_like(taken, 0) + (i + 1), taken)
        ids = torch.cat([above, torch.cat([left, paint.to(ids.dtype), right], dim=1), below])
    return ids


def merged(
    detections: Detections | None,
    labels: torch.Tensor,
    num_classes: int,
    postprocess: Any,
    thresholds: tuple[torch.Tensor, ...],
) -> dict[str, torch.Tensor]:
    """The panoptic map and its segments, see :func:`panoptic_fpn_ext.modeling.merging`."""
    overlap_threshold, stuff_area_limit, score_threshold = thresholds
    empty = torch.zeros_like(labels, dtype=torch.int32)
    if detections is None:
        numbers = scores = classes = torch.zeros(0, dtype=torch.int64)
        scores, ids = scores.float(), empty
    else:
        numbers = (detections.scores.double() >= score_threshold).nonzero()[:, 0]
        nms_threshold = postprocess.merging["nms_thresh"]
        if nms_threshold < 1:
            kept = kept_by_nms(
                detections.boxes[numbers],
                detections.scores[numbers],
                torch.zeros_like(numbers),
                torch.tensor([nms_threshold]),
                1,
                2**31,
            )
            numbers = numbers[kept]
        boxes, scores = detections.boxes[numbers], detections.scores[numbers]
        classes = detections.classes[numbers]
        size = torch._shape_as_tensor(labels)
        first, last = (boxes[:, :2].floor() - 1).clamp(min=0), boxes[:, 2:].ceil() + 1
        most = size.flip(0).float()
        first, last = torch.minimum(first, most), torch.minimum(last, most)
        windows = torch.cat([first, torch.maximum(first, last)], dim=1).long()
        ids = painted(detections.probabilities[numbers], boxes, windows, empty, overlap_threshold)
    # Instances from 1, then classes: one number for each pixel, counted at once.
    num_instances = torch._shape_as_tensor(numbers)[0]
    index = torch.where(ids > 0, ids.long() - 1, labels + num_instances)
    counts = torch.zeros(num_instances + num_classes, dtype=torch.int64)
    flat = index.flatten()
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    isthing = torch.cat([torch.ones_like(numbers), torch.zeros(num_classes, dtype=torch.int64)]) > 0
    is_stuff_class = torch.ones(num_classes, dtype=torch.bool)
    for class_id in postprocess.merging["thing_sem_seg_ids"]:
        if 0 <= class_id < num_classes:
            is_stuff_class[class_id] = False
    may_be = torch.cat([numbers >= 0, is_stuff_class])
    is_large = counts.double() >= stuff_area_limit
    is_segment = may_be & (counts > 0) & (isthing | is_large)
    segment_ids = is_segment.long().cumsum(0) * is_segment.long()
    chosen = is_segment.nonzero()[:, 0]
    no_number = torch.full((num_classes,), -1, dtype=torch.int64)
    return {
        "panoptic_seg": segment_ids.int()[index],
        "segment_id": segment_ids.int()[chosen],
        "segment_category_id": torch.cat([classes, torch.arange(num_classes)])[chosen].int(),
        "segment_isthing": isthing[chosen],
        "segment_score": torch.cat([scores, torch.ones(num_classes)])[chosen],
        "segment_area": counts[chosen],
        "segment_instance_id": torch.cat([numbers, no_number])[chosen].int(),
    }
