"""Training and evaluation: configuration from the command line, processes, the trainer."""

from .launch import launch
from .setup import setup
from .trainer import Trainer

__all__ = ["Trainer", "launch", "setup"]
