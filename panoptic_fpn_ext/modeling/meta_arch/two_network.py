"""Two separate networks merged: what one Panoptic FPN is compared with (paper, section 4.3)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from ...config import resolve_config
from ...errors import UserError
from ..acceleration import Acceleration, on_own_gpu, planar
from ..postprocessing import PanopticPostprocessor
from .ground_truth import ground_truth
from .semantic_fpn import SemanticFPN


@META_ARCH_REGISTRY.register()
class TwoNetworkPanopticFPN(nn.Module):
    """A Mask R-CNN with FPN and a Semantic FPN that share nothing but their merged output.

    Both are built from the same config. Each can start from weights of its own; a checkpoint of
    this model has both, under ``instance_network`` and ``semantic_network``. Trained, each
    learns exactly as it would alone.
    """

    @configurable
    def __init__(
        self,
        *,
        instance_network: GeneralizedRCNN,
        semantic_network: SemanticFPN,
        postprocess: PanopticPostprocessor | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        """
        Args:
            instance_network: finds things.
            semantic_network: finds stuff; its head's ``loss_weight`` is the one that it has alone.
            postprocess: makes the outputs of an image; by default all of them.
            acceleration: what is done for speed; by default as ``MODEL.ACCELERATION``.
        """
        super().__init__()
        self.instance_network = instance_network
        self.semantic_network = semantic_network
        self.postprocess = postprocess or PanopticPostprocessor()
        self.acceleration = acceleration or Acceleration()
        self.acceleration.apply(self)
        self.fixed_part = self.acceleration.fixed_part()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """
        Raises:
            UserError: weights of one network alone; a file that is missing or no checkpoint; one
                for other classes or with other shapes than the network's; one with more than a
                backbone that lacks parameters of the network.
        """
        cfg = resolve_config(cfg)
        weights = {
            f"MODEL.TWO_NETWORK.{name}": cfg.MODEL.TWO_NETWORK[name]
            for name in ("INSTANCE_WEIGHTS", "SEMANTIC_WEIGHTS")
        }
        missing = [key for key, path in weights.items() if not path]
        if len(missing) == 1:
            raise UserError(
                f"{missing[0]} is not set, but the other network has weights: set both, or neither"
            )
        networks = {
            "instance_network": GeneralizedRCNN(cfg),
            "semantic_network": SemanticFPN(cfg),
        }
        if not missing:
            # Late: what trains and loads models comes after the models.
            from ...engine.checkpoint import PanopticFPNCheckpointer

            for network, (key, path) in zip(networks.values(), weights.items(), strict=True):
                checkpointer = PanopticFPNCheckpointer(
                    network, complete=True, backbone_suffices=True
                )
                try:
                    checkpointer.load(path)
                except UserError as error:
                    raise UserError(f"{key} {error}") from error
        return {
            **networks,
            "postprocess": PanopticPostprocessor(cfg),
            "acceleration": Acceleration.from_config(cfg),
        }

    @property
    def device(self) -> torch.device:
        return self.instance_network.device

    @on_own_gpu
    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """See :meth:`PanopticFPNExt.forward`; in training the losses of both networks."""
        if self.training:
            ground_truth(batched_inputs, "instances")
            return {
                **self.instance_network(batched_inputs),
                **self.semantic_network(batched_inputs),
            }
        with self.acceleration.autocast(self.device):
            return self._inference(batched_inputs)

    def _inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sem_seg = instances = [None] * len(batched_inputs)
        stride = 1
        if self.postprocess.needs("sem_seg"):
            network = self.semantic_network
            images = network.preprocess_image(batched_inputs)
            sem_seg, stride = self.fixed_part(network.network, network, images.tensor)
        if self.postprocess.needs("instances"):
            network = self.instance_network
            images = network.preprocess_image(batched_inputs)
            features = self.fixed_part(network.backbone, network, images.tensor)
            proposals, _ = network.proposal_generator(images, features, None)
            instances, _ = network.roi_heads(images, planar(features), proposals, None)
        return [
            self.postprocess(*args, stride=stride)
            for args in zip(sem_seg, instances, images.image_sizes, batched_inputs, strict=True)
        ]
