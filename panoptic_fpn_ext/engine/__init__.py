"""Training and evaluation: configuration from the command line, processes, the trainer."""

from .checkpoint import trained_model
from .interruption import Interrupted
from .launch import choose_processes, launch
from .setup import setup, setup_prediction, setup_trained
from .trainer import Trainer

__all__ = [
    "Interrupted",
    "Trainer",
    "choose_processes",
    "launch",
    "setup",
    "setup_prediction",
    "setup_trained",
    "trained_model",
]
