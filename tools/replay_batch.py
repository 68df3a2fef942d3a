#!/usr/bin/env python
"""Do the iteration again at which a loss was infinite or nan, and say where that comes from.

    python tools/replay_batch.py output/quickstart/failed_batch.pth

Training writes that file when it stops so; the config is config.yaml beside it. KEY VALUE pairs
change it: SOLVER.AMP.ENABLED False tells whether float16 is the reason, MODEL.DEVICE cpu whether
the GPU is.

Exit status: 0 if something is infinite or nan again, 1 if nothing is, 2 a mistake.
"""

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from panoptic_fpn_ext.engine import setup_trained
from panoptic_fpn_ext.engine.failed_batch import replay

SHOWN = 3  # names of each kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="failed_batch.pth")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(arguments)
    try:
        if not args.file.is_file():
            raise UserError(f"FILE {args.file}: no such file")
        config = str(args.file.parent / "config.yaml")
        cfg = setup_trained(config, [*args.opts, "MODEL.WEIGHTS", str(args.file)])
        found = replay(cfg, args.file)
    except UserError as error:
        print(f"replay_batch.py: error: {error}", file=sys.stderr)
        return 2
    print(f"iteration {found.iteration}, of {', '.join(found.images)}")
    for name, loss in found.losses.items():
        print(f"  {name} {loss:.4g}")
    if found.error:
        print(f"  {found.error}")
    for what, names in (("weights", found.weights), ("gradients", found.gradients)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"{what} that are infinite or nan: {', '.join(names[:SHOWN])}{more}")
    if found.module:
        print(f"first output that is infinite or nan: that of {found.module}")
    if found.is_finite:
        print("all is finite: it was another process, or a device that computes otherwise")
    return 1 if found.is_finite else 0


if __name__ == "__main__":
    sys.exit(main())
