#!/usr/bin/env python
"""Train or evaluate a Panoptic FPN.

python train_net.py --config-file configs/quickstart.yaml
python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS FILE
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch and Detectron2)

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from panoptic_fpn_ext.data import register_datasets_of_config
from panoptic_fpn_ext.engine import (
    Interrupted,
    Trainer,
    launch,
    run_folder,
    setup,
    trained_model,
)


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run in each process."""
    run_folder.prepare_process(cfg, args)
    register_datasets_of_config(cfg)
    if args.eval_only:
        model = trained_model(cfg, resume=args.resume)
        run_folder.write_config(cfg, Path(cfg.OUTPUT_DIR, "inference"))
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    replaced = [] if args.resume else run_folder.files_of_training(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    # Nothing of an earlier run is touched before it is known that this one can begin.
    run_folder.remove(replaced)
    run_folder.write_config(cfg, cfg.OUTPUT_DIR)
    trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the training that is in OUTPUT_DIR"
    )
    parser.set_defaults(dist_url="auto")
    arguments = parser.parse_args()
    try:
        config = setup(arguments)
        trains = not arguments.eval_only and arguments.machine_rank == 0
        replace = {"resume": arguments.resume, "overwrite": arguments.overwrite}
        with run_folder.owned(config.OUTPUT_DIR, **replace) if trains else nullcontext():
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
    except Interrupted as interruption:
        print(f"train_net.py: {interruption}", file=sys.stderr)
        sys.exit(interruption.status)
