"""The semantic head, the meta-architectures and the merging of their outputs."""

from .acceleration import Acceleration, accelerate, decelerate
from .backbones import DilatedResNet, GroupedFPN, SymmetricDecoder
from .merging import merge_panoptic
from .meta_arch import PanopticFPNExt, SemanticFPN, TwoNetworkPanopticFPN
from .postprocessing import PanopticPostprocessor
from .semantic_head import SemanticFPNHead

__all__ = [
    "Acceleration",
    "DilatedResNet",
    "GroupedFPN",
    "PanopticFPNExt",
    "PanopticPostprocessor",
    "SemanticFPN",
    "SemanticFPNHead",
    "SymmetricDecoder",
    "TwoNetworkPanopticFPN",
    "accelerate",
    "decelerate",
    "merge_panoptic",
]
