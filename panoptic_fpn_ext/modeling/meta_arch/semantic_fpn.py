"""Semantic FPN: the semantic branch alone (paper, section 4.1)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor

from ...config import resolve_dataset_keys
from ..acceleration import accelerate


@META_ARCH_REGISTRY.register()
class SemanticFPN(SemanticSegmentor):
    """Detectron2's ``SemanticSegmentor`` whose classes follow the dataset.

    Returns for each image ``sem_seg``, (num_classes, height, width) logits; in training the
    semantic loss. Its configs say so: ``MODEL.PANOPTIC_FPN.OUTPUTS: ["sem_seg"]``.
    """

    @configurable
    def __init__(
        self, *, fold_batch_norm: bool = False, winograd: bool = False, **segmentor_args: Any
    ) -> None:
        """
        Args:
            fold_batch_norm, winograd: see :func:`accelerate`.
            segmentor_args: those of ``SemanticSegmentor``.
        """
        super().__init__(**segmentor_args)
        accelerate(self, fold_batch_norm=fold_batch_norm, winograd=winograd)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        cfg = resolve_dataset_keys(cfg)
        return {
            **super().from_config(cfg),
            "fold_batch_norm": cfg.MODEL.FOLD_BN,
            "winograd": cfg.MODEL.WINOGRAD,
        }
