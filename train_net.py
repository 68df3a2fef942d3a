#!/usr/bin/env python
"""Train or evaluate a Panoptic FPN.

python train_net.py --config-file configs/quickstart.yaml
python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS FILE
torchrun --nproc-per-node 8 train_net.py --config-file configs/quickstart.yaml
"""

import argparse
import sys
from pathlib import Path

from panoptic_fpn_ext import UserError  # isort: skip  (before PyTorch and Detectron2)

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from panoptic_fpn_ext.data import register_datasets_of_config
from panoptic_fpn_ext.engine import (
    Interrupted,
    Trainer,
    choose_processes,
    launch,
    run_folder,
    setup,
    trained_model,
)
from panoptic_fpn_ext.engine.launch import PROCESS_OPTIONS, says


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run in each process."""
    if args.eval_only:
        evaluate(args, cfg)
    elif comm.is_main_process():
        with run_folder.owned(cfg.OUTPUT_DIR, resume=args.resume, overwrite=args.overwrite):
            train(args, cfg)
    else:
        train(args, cfg)


def evaluate(args: argparse.Namespace, cfg: CfgNode) -> None:
    run_folder.prepare_process(cfg, args)
    register_datasets_of_config(cfg)
    model = trained_model(cfg, resume=args.resume)
    run_folder.write_config(cfg, Path(cfg.OUTPUT_DIR, "inference"))
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)


def train(args: argparse.Namespace, cfg: CfgNode) -> None:
    run_folder.prepare_process(cfg, args)
    register_datasets_of_config(cfg)
    replaced = [] if args.resume else run_folder.files_of_training(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    # Nothing of an earlier run is touched before it is known that this one can begin.
    run_folder.remove(replaced)
    run_folder.write_config(cfg, cfg.OUTPUT_DIR)
    run_folder.note_torchrun(cfg.OUTPUT_DIR)
    trainer.train()


def end(message: object, status: int) -> None:
    if says(str(message)):
        print(f"train_net.py: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the training that is in OUTPUT_DIR"
    )
    parser.set_defaults(**dict.fromkeys(PROCESS_OPTIONS))
    arguments = parser.parse_args()
    try:
        choose_processes(arguments)
        config = setup(arguments)
        arguments.resume |= run_folder.is_restarted(config.OUTPUT_DIR)
        launch(
            main,
            *(getattr(arguments, name) for name in PROCESS_OPTIONS),
            args=(arguments, config),
            device=config.MODEL.DEVICE,
        )
    except UserError as error:
        end(f"error: {error}", 2)
    except ChildFailedError as error:
        end(f"error: {error}", 1)
    except Interrupted as interruption:
        end(interruption, interruption.status)
