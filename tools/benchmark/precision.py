"""In which floating point both models run, and how close their answers are then."""

import argparse
import contextlib

import torch

# tf32 is float32 whose products GPUs have in less; PyTorch's default for convolutions alone.
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def is_exact(args: argparse.Namespace) -> bool:
    """Whether both models run in float32."""
    return {args.precision, args.detectron2_precision or args.precision} == {"fp32"}


def tolerance(args: argparse.Namespace) -> float:
    """How far losses and gradients may be from Detectron2's, as a share of them."""
    return 1e-3 if is_exact(args) else 0.05
