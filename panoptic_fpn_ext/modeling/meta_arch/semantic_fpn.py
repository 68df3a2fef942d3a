"""Semantic FPN: the semantic branch alone (paper, section 4.1)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from detectron2.structures import ImageList

from ...config import resolve_config
from ..acceleration import Acceleration, on_own_gpu
from ..postprocessing import PanopticPostprocessor
from ..semantic_head import logits_for_postprocessing
from .ground_truth import ground_truth
from .padding import padded


@META_ARCH_REGISTRY.register()
class SemanticFPN(SemanticSegmentor):
    """Detectron2's ``SemanticSegmentor``, whose classes follow the dataset and which never holds
    logits at full resolution twice.
    """

    @configurable
    def __init__(self, *, acceleration: Acceleration | None = None, **segmentor_args: Any) -> None:
        """
        Args:
            acceleration: what is done for speed; by default as ``MODEL.ACCELERATION``.
            segmentor_args: those of ``SemanticSegmentor``.
        """
        super().__init__(**segmentor_args)
        self.acceleration = acceleration or Acceleration()
        self.acceleration.apply(self)
        self.fixed_part = self.acceleration.fixed_part()
        self.postprocess = PanopticPostprocessor(outputs=["sem_seg"])

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        cfg = resolve_config(cfg)
        return {**super().from_config(cfg), "acceleration": Acceleration.from_config(cfg)}

    @on_own_gpu
    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """
        Args:
            batched_inputs: a dict for each image: ``image`` (C, H, W); in training ``sem_seg``
                (H, W); in inference optionally ``height`` and ``width`` of the outputs.

        Returns:
            In training ``{"loss_sem_seg": scalar}``; in inference for each image ``{"sem_seg":
            (num_classes, height, width) logits}``.
        """
        images = self.preprocess_image(batched_inputs)
        if self.training:
            maps = [x.to(self.device) for x in ground_truth(batched_inputs, "sem_seg")]
            targets = padded(maps, self.backbone, self.sem_seg_head.ignore_value).tensor
            return self.sem_seg_head(self.backbone(images.tensor), targets)[1]
        with self.acceleration.autocast(self.device):
            logits, stride = self.fixed_part(self.network, self, images.tensor)
            return [
                self.postprocess(sem_seg, None, image_size, inputs, stride=stride)
                for sem_seg, image_size, inputs in zip(
                    logits, images.image_sizes, batched_inputs, strict=True
                )
            ]

    def network(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Logits of padded images and their stride, see :func:`logits_for_postprocessing`."""
        return logits_for_postprocessing(self.sem_seg_head, self.backbone(images))

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The images, normalized and padded."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        return padded([(x - self.pixel_mean) / self.pixel_std for x in images], self.backbone)
