#!/usr/bin/env python
"""Train or evaluate a Panoptic FPN.

python train_net.py --config-file configs/quickstart.yaml
python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS FILE
"""

import argparse
import sys

from panoptic_fpn_ext import UserError  # isort: skip  (says what to do without a Detectron2)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup

from panoptic_fpn_ext.engine import Trainer, launch, setup


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run in each process."""
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    try:
        config = setup(arguments)
        launch(
            main,
            arguments.num_gpus,
            arguments.num_machines,
            arguments.machine_rank,
            arguments.dist_url,
            args=(arguments, config),
        )
    except UserError as error:
        print(f"train_net.py: error: {error}", file=sys.stderr)
        sys.exit(2)
