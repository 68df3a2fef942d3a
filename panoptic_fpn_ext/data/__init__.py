"""Panoptic datasets: registration, and ground truth of both branches from panoptic PNGs."""

from . import builtin
from .mapper import PanopticFPNMapper
from .registration import register_datasets_of_config, register_panoptic_dataset

__all__ = [
    "PanopticFPNMapper",
    "builtin",
    "register_datasets_of_config",
    "register_panoptic_dataset",
]
