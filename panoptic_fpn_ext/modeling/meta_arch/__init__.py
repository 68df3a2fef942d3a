"""The meta-architectures: one network for both tasks, its semantic branch alone, two networks."""

from .panoptic_fpn import PanopticFPNExt
from .semantic_fpn import SemanticFPN
from .two_network import TwoNetworkPanopticFPN

__all__ = ["PanopticFPNExt", "SemanticFPN", "TwoNetworkPanopticFPN"]
