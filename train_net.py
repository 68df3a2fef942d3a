#!/usr/bin/env python
"""Train or evaluate a Panoptic FPN.

python train_net.py --config-file configs/quickstart.yaml
python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS FILE
"""

import argparse
import sys

from panoptic_fpn_ext import UserError  # isort: skip  (says what to do without a Detectron2)

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from panoptic_fpn_ext.data import register_datasets_of_config
from panoptic_fpn_ext.engine import Trainer, launch, setup
from panoptic_fpn_ext.engine.checkpoint import PanopticFPNCheckpointer


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run in each process."""
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="panoptic_fpn_ext")
    register_datasets_of_config(cfg)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = PanopticFPNCheckpointer(model, cfg.OUTPUT_DIR, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.set_defaults(dist_url="auto")
    arguments = parser.parse_args()
    try:
        config = setup(arguments)
        launch(
            main,
            arguments.num_gpus,
            arguments.num_machines,
            arguments.machine_rank,
            arguments.dist_url,
            args=(arguments, config),
            device=config.MODEL.DEVICE,
        )
    except UserError as error:
        print(f"train_net.py: error: {error}", file=sys.stderr)
        sys.exit(2)
