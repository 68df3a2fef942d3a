"""Training and evaluation: configuration from the command line, processes, the trainer."""

from .interruption import Interrupted
from .launch import launch
from .setup import setup
from .trainer import Trainer

__all__ = ["Interrupted", "Trainer", "launch", "setup"]
