"""The semantic head, the meta-architectures and the merging of their outputs."""

from .merging import merge_panoptic
from .panoptic_fpn import PanopticFPNExt
from .semantic_head import SemanticFPNHead

__all__ = ["PanopticFPNExt", "SemanticFPNHead", "merge_panoptic"]
