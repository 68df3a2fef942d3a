#!/usr/bin/env python
"""Write the weights of a checkpoint, and nothing else, as .safetensors or .pth.

    python tools/convert_checkpoint.py output/quickstart/model_final.pth model.safetensors

INPUT is whatever MODEL.WEIGHTS takes: .pth, .pkl of Detectron2's model zoo, .pyth, .safetensors;
nothing in it is run. MODEL.WEIGHTS takes OUTPUT too.
"""

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch)

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from panoptic_fpn_ext.engine.checkpoint_files import read_checkpoint, whole_file

ENDINGS = (".safetensors", ".pth")
NAMES_OF_ANOTHER = ("matching_heuristics", "__author__")  # they say whose names the weights have


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT", help=f"ends in {' or '.join(ENDINGS)}")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    args = parser.parse_args(arguments)
    ending = os.path.splitext(args.output)[1]
    if ending not in ENDINGS:
        raise UserError(f"OUTPUT {args.output}: must end in {' or '.join(ENDINGS)}")
    if not os.path.isfile(args.input):
        raise UserError(f"INPUT {args.input}: no such file")
    if os.path.exists(args.output):
        if os.path.samefile(args.input, args.output):
            raise UserError(f"OUTPUT {args.output} is INPUT: choose another")
        if not args.overwrite:
            raise UserError(f"OUTPUT {args.output} is there: --overwrite replaces it")
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        raise UserError(f"OUTPUT {args.output}: there is no folder {folder}")

    content = read_checkpoint(args.input)
    weights = content.pop("model")
    names = {key: content.pop(key) for key in NAMES_OF_ANOTHER if content.get(key)}
    # Parameters that share their memory are written under each of their names.
    weights = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    try:
        with whole_file(args.output) as file:
            if ending == ".pth":
                torch.save({"model": weights, **names}, file)
            else:
                metadata = {"format": "pt", **{key: str(value) for key, value in names.items()}}
                file.write(safetensors.torch.save(weights, metadata))
    except (KeyError, ValueError) as error:  # a type that .safetensors does not have
        raise UserError(f"{args.output}: cannot hold these weights ({error}); try .pth") from error
    numbers = sum(value.numel() for value in weights.values())
    print(f"{args.output}: {len(weights)} tensors of {numbers / 1e6:.1f} million numbers")
    dropped = [key for key in content if content[key] or key not in NAMES_OF_ANOTHER]
    if dropped:
        print(f"left out: {', '.join(_described(key, content[key]) for key in dropped)}")


def _described(key: str, value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return key
    parts = {**value, **value.pop("_trainer", {})} if "_trainer" in value else value
    return f"{key} ({', '.join(map(str, parts))})"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        sys.exit(2)
