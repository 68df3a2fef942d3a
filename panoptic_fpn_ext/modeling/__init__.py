"""The semantic head, the meta-architectures and the merging of their outputs."""

from .backbones import DilatedResNet, GroupedFPN, SymmetricDecoder
from .merging import merge_panoptic
from .panoptic_fpn import PanopticFPNExt
from .postprocessing import PanopticPostprocessor
from .semantic_fpn import SemanticFPN
from .semantic_head import SemanticFPNHead
from .two_network import TwoNetworkPanopticFPN

__all__ = [
    "DilatedResNet",
    "GroupedFPN",
    "PanopticFPNExt",
    "PanopticPostprocessor",
    "SemanticFPN",
    "SemanticFPNHead",
    "SymmetricDecoder",
    "TwoNetworkPanopticFPN",
    "merge_panoptic",
]
