"""Training and evaluation: configuration from the command line, processes, the trainer."""

from .checkpoint import PanopticFPNCheckpointer
from .launch import launch
from .setup import setup
from .trainer import Trainer

__all__ = ["PanopticFPNCheckpointer", "Trainer", "launch", "setup"]
