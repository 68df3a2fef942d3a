"""Detectron2's modules with the same parameters and results, fewer operators, waits for a GPU and
less memory."""

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import nn
from torch.nn import functional as F

from ..layers.convolution import has_winograd
from ..layers.stand_in import (
    StandIn,
    is_eager,
    is_eager_on_cpu_in_any_precision,
    is_eager_on_gpu,
)

# What bounds memory in inference on CPUs: so many masks at once; of a level with more pixels than
# the first, strips of so many.
MAX_MASKS = 32
RPN_MAX_PIXELS = 2**16
RPN_STRIP_PIXELS = 2**14


class LeanRPNHead(StandIn, StandardRPNHead):
    """Detectron2's, which in inference on CPUs has the hidden features of a large level in memory
    some rows at a time."""

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Objectness logits and anchor deltas of each level."""
        objectness: list[torch.Tensor] = []
        deltas: list[torch.Tensor] = []
        for feature in features:
            if not torch.jit.is_scripting() and self._is_large(feature):
                of_level = self._in_strips(feature)
            else:
                hidden = self.conv(feature)
                of_level = self.objectness_logits(hidden), self.anchor_deltas(hidden)
            objectness.append(of_level[0])
            deltas.append(of_level[1])
        return objectness, deltas

    @torch.jit.unused
    def _is_large(self, feature: torch.Tensor) -> bool:
        return has_winograd(feature) and feature.shape[2] * feature.shape[3] > RPN_MAX_PIXELS

    @torch.jit.unused
    def _in_strips(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = feature.shape[-2:]
        rows = max(1, RPN_STRIP_PIXELS // width)
        margin = sum(isinstance(module, nn.Conv2d) for module in self.conv.modules())
        strips = []
        for start in range(0, height, rows):
            stop, first = start + rows, max(start - margin, 0)
            hidden = self.conv(feature[:, :, first : stop + margin])
            hidden = hidden[:, :, start - first : stop - first]
            strips.append((self.objectness_logits(hidden), self.anchor_deltas(hidden)))
        objectness, deltas = (torch.cat(parts, dim=2) for parts in zip(*strips, strict=True))
        return objectness, deltas


class LeanRPN(StandIn, RPN):
    """Detectron2's, which decodes no more boxes than may be proposed, those of all levels at once,
    has the deltas of no more anchors than have an object, and seldom waits for a GPU: for proposals
    once an image, in NMS, and once more, for the losses twice."""

    def head_outputs(
        self, features: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Objectness logits and anchor deltas of each of ``in_features``."""
        return self.rpn_head([features[name] for name in self.in_features])

    def proposals_from(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        head_outputs: tuple[list[torch.Tensor], list[torch.Tensor]],
    ) -> list[Instances]:
        """Inference without the head.

        Args:
            images: for their sizes.
            features: of the backbone, for theirs.
            head_outputs: see there.

        Returns:
            See :meth:`predict_proposals`.
        """
        logits, deltas = head_outputs
        box_dim = self.anchor_generator.box_dim
        return self.predict_proposals(
            self.anchor_generator([features[name] for name in self.in_features]),
            [x.permute(0, 2, 3, 1).flatten(1) for x in logits],
            [x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas],
            images.image_sizes,
        )

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            anchors, pred_objectness_logits, pred_anchor_deltas: see :meth:`predict_proposals`.
            gt_labels: of each image, (R,) for all R anchors: 1 object, 0 background, -1 neither.
            gt_boxes: of each image, (R, 4): the object of each anchor that has one.

        Returns:
            ``loss_rpn_cls`` and ``loss_rpn_loc``, weighted.
        """
        if self.box_reg_loss_type != "smooth_l1":
            return super().losses(
                anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
            )
        labels = torch.stack(gt_labels)
        image, place = (labels == 1).nonzero().unbind(dim=1)
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", len(place) / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (labels == 0).sum().item() / len(labels))
        targets = self.box2box_transform.get_deltas(
            Boxes.cat(anchors).tensor[place], torch.stack(gt_boxes)[image, place]
        )
        deltas = torch.cat(pred_anchor_deltas, dim=1)[image, place]
        logits = torch.cat(pred_objectness_logits, dim=1)
        losses = {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(
                logits, labels.to(logits.dtype), (labels >= 0).to(logits.dtype), reduction="sum"
            ),
            "loss_rpn_loc": smooth_l1_loss(deltas, targets, self.smooth_l1_beta, reduction="sum"),
        }
        normalizer = self.batch_size_per_image * len(labels)
        return {k: v / normalizer * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors: for each level Hi * Wi * A.
            pred_objectness_logits: for each level (N, Hi * Wi * A).
            pred_anchor_deltas: for each level (N, Hi * Wi * A, 4).
            image_sizes: (height, width) of each image.

        Returns:
            For each image ``proposal_boxes`` and ``objectness_logits``, by descending score.

        Raises:
            FloatingPointError: in training, boxes or scores that are not finite.
        """
        if not torch.jit.is_scripting() and is_eager(*pred_objectness_logits):
            return self._proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        with torch.no_grad():
            return find_top_rpn_proposals(
                self._decode_proposals(anchors, pred_anchor_deltas),
                pred_objectness_logits,
                image_sizes,
                self.nms_thresh,
                self.pre_nms_topk[self.training],
                self.post_nms_topk[self.training],
                self.min_box_size,
                self.training,
            )

    @torch.jit.unused
    @torch.no_grad()
    def _proposals(
        self,
        anchors: list[Boxes],
        logits: list[torch.Tensor],
        deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See :meth:`predict_proposals`."""
        best, places, levels, start = [], [], [], 0
        for level, level_logits in enumerate(logits):
            size = level_logits.shape[1]
            level_best, place = level_logits.topk(min(size, self.pre_nms_topk[self.training]))
            best.append(level_best)
            places.append(place + start)
            levels.append(place.new_full(place.shape[1:], level))
            start += size
        scores, place, level = torch.cat(best, 1), torch.cat(places, 1), torch.cat(levels)
        chosen = torch.cat(deltas, 1).gather(1, place[..., None].expand(-1, -1, deltas[0].shape[2]))
        boxes = self.box2box_transform.apply_deltas(
            chosen.flatten(0, 1), Boxes.cat(anchors).tensor[place.flatten()]
        ).view_as(chosen)

        finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
        for (height, width), of_image in zip(image_sizes, boxes, strict=True):
            of_image[:, 0::2].clamp_(0, width)
            of_image[:, 1::2].clamp_(0, height)
        # What Detectron2 takes out stays without area, at the end: it overlaps nothing.
        extent = boxes[..., 2:] - boxes[..., :2]
        valid = finite & (extent > self.min_box_size).all(dim=2)
        boxes = torch.where(valid[..., None], boxes, 0)
        scores = torch.where(valid, scores, -torch.inf)

        kept = [
            batched_nms(*of_image, level, self.nms_thresh)[: self.post_nms_topk[self.training]]
            for of_image in zip(boxes, scores, strict=True)
        ]
        counts = [valid[i, keep].sum() for i, keep in enumerate(kept)]
        *numbers, all_finite = torch.stack([*counts, finite.all()]).tolist()
        if self.training and not all_finite:
            raise FloatingPointError(
                "Predicted boxes or scores contain Inf/NaN. Training has diverged."
            )
        results = []
        for i, (image_size, keep, number) in enumerate(
            zip(image_sizes, kept, numbers, strict=True)
        ):
            keep = keep[:number]
            fields = {"proposal_boxes": Boxes(boxes[i][keep]), "objectness_logits": scores[i][keep]}
            results.append(Instances(image_size, **fields))
        return results


class LeanROIPooler(StandIn, ROIPooler):
    """Detectron2's, which on GPUs does not wait to know how many boxes each level has: RoIAlign has
    all boxes on each, those of other levels at a place where there is nothing to sample."""

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """(N, C, Hi, Wi) maps of each level and boxes of each image to (M, C, h, w) features."""
        if not torch.jit.is_scripting() and (
            not is_eager_on_gpu(*x) or len(x) == 1 or len(box_lists) == 0 or not self._aligns()
        ):
            return super().forward(x, box_lists)
        boxes = torch.cat(
            [F.pad(b.tensor, (1, 0), value=float(i)) for i, b in enumerate(box_lists)]
        )
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        # Without area, far outside of any image; half precision has it, too.
        nowhere = torch.full_like(boxes[:1], -3e4)
        nowhere[:, 0] = 0
        pooled: list[torch.Tensor] = []
        for level, pooler in enumerate(self.level_poolers):
            of_level = pooler(x[level], torch.where((levels == level)[:, None], boxes, nowhere))
            pooled = [pooled[0] + of_level] if len(pooled) > 0 else [of_level]
        return pooled[0]

    @torch.jit.unused
    def _aligns(self) -> bool:
        return all(hasattr(pooler, "aligned") for pooler in self.level_poolers)


class LeanBoxPredictor(StandIn, FastRCNNOutputLayers):
    """Detectron2's, which waits for a GPU twice an image: for the number of candidates, and in
    NMS."""

    def inference(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """
        Args:
            predictions: (M, K + 1) logits and (M, K * 4) or (M, 4) deltas.
            proposals: of each image, M in all, with ``proposal_boxes``.

        Returns:
            For each image ``pred_boxes``, ``scores`` and ``pred_classes`` by descending score; and
            which of its proposals each is.
        """
        # Scores of half precision would be equal too often, and NumPy does not know bfloat16.
        predictions = (_in_full(predictions[0]), _in_full(predictions[1]))
        boxes = self.predict_boxes(predictions, proposals)
        scores = self.predict_probs(predictions, proposals)
        image_sizes = [x.image_size for x in proposals]
        if torch.jit.is_scripting() or not is_eager(*predictions):
            return fast_rcnn_inference(
                boxes,
                scores,
                image_sizes,
                self.test_score_thresh,
                self.test_nms_thresh,
                self.test_topk_per_image,
            )
        found = [*map(self._detections, boxes, scores, image_sizes)]
        return [instances for instances, _ in found], [rows for _, rows in found]

    @torch.jit.unused
    def _detections(
        self, boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int]
    ) -> tuple[Instances, torch.Tensor]:
        """See :meth:`inference`, of one image."""
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        scores = scores[:, :-1]
        candidates = (scores > self.test_score_thresh) & finite[:, None]
        rows, classes = candidates.nonzero().unbind(dim=1)
        scores = scores[rows, classes]
        boxes = boxes.unflatten(1, (boxes.shape[1] // 4, 4))
        boxes = boxes[rows, classes if boxes.shape[1] > 1 else 0]
        height, width = image_size
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        keep = batched_nms(boxes, scores, classes, self.test_nms_thresh)
        if self.test_topk_per_image >= 0:
            keep = keep[: self.test_topk_per_image]
        fields = {
            "pred_boxes": Boxes(boxes[keep]),
            "scores": scores[keep],
            "pred_classes": classes[keep],
        }
        return Instances(image_size, **fields), rows[keep]


class LeanMaskHead(StandIn, MaskRCNNConvUpsampleHead):
    """Detectron2's, which in inference on CPUs has the features of some instances at once in
    memory."""

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) features to (N, num_classes, 2H, 2W) logits."""
        if not torch.jit.is_scripting():
            if self.training or not is_eager_on_cpu_in_any_precision(x):
                return super().layers(x)
            plain = super().layers
            return torch.cat([plain(part) for part in x.split(MAX_MASKS)])
        for layer in self:
            x = layer(x)
        return x


def _in_full(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
