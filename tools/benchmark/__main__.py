#!/usr/bin/env python
"""Time panoptic_fpn_ext against Detectron2, and check that both give the same answer.

    python tools/benchmark inference --device cpu --json inference.json
    python tools/benchmark inference --device cuda --precision fp16 --peers
    python tools/benchmark inference --growth --rounds 3
    python tools/benchmark training --images 2
    python tools/benchmark acceleration
    python tools/benchmark export --rounds 5
    python tools/benchmark launches
    python tools/benchmark loading --rounds 1
    python tools/benchmark plot inference.json training.json --output speed.svg
    python tools/benchmark evaluation --sizes 1024x2048
    python tools/benchmark eval-only --config-file configs/quickstart.yaml \\
        --opts MODEL.WEIGHTS output/quickstart/model_final.pth

Both run by turns (A B A B ...), after a turn that is not counted, in one process, with the same
weights and inputs. Nothing is downloaded: but for eval-only weights are random, and what they
would not find is planted. Exit status 1 where the answers differ.

docs/PERFORMANCE.md has figures and says what the rows are.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler tells of every start and stop

if __name__ == "__main__":  # this folder is a package beside the other tools
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmark.acceleration import acceleration
from benchmark.eval_only import eval_only
from benchmark.evaluation import evaluation
from benchmark.export import export
from benchmark.frame import environment, use_cores
from benchmark.inference import DETECTIONS, OUTPUT_CHOICES, inference
from benchmark.kernels import kernels
from benchmark.launches import launches
from benchmark.loading import loading
from benchmark.models import DEPTHS, SETTINGS, Setting
from benchmark.plot import plot
from benchmark.precision import DTYPES
from benchmark.results import report
from benchmark.table import table
from benchmark.training import training
from panoptic_fpn_ext import UserError


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for instance 480x640")
    return int(height), int(width)


def setting(text: str) -> Setting:
    if text in SETTINGS:
        return SETTINGS[text]
    try:
        return Setting(size(text), size(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {' or '.join(SETTINGS)}") from None


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no CUDA GPU here: use cpu")
    return torch.device(text)


def picture(text: str) -> Path:
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg or .png")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(required=True, metavar="WHAT")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=positive, default=5, help="default: 5")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")

    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    models.add_argument("--threads", type=positive, help="default: all cores")
    models.add_argument("--backbone", choices=DEPTHS, default="R50", help="default: R50")
    models.add_argument(
        "--precision", choices=DTYPES, default="fp32", help="autocast of both; default: fp32"
    )
    models.add_argument(
        "--detectron2-precision", choices=DTYPES, help="another one for Detectron2's model"
    )
    models.add_argument(
        "--sizes",
        type=setting,
        nargs="+",
        metavar="SIZE",
        help=f"{', '.join(SETTINGS)} or HEIGHTxWIDTH; default: coco, for inference both",
    )
    models.add_argument("--images", type=positive, default=1, help="in a batch; default: 1")
    models.add_argument(
        "--opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys of our model, and their values",
    )

    command = subcommands.add_parser(
        "inference", parents=[common, models], help="an image, whole and stage by stage"
    )
    command.add_argument(
        "--detections",
        type=positive,
        nargs="+",
        metavar="N",
        help=f"in an image; default: {' '.join(map(str, DETECTIONS))}",
    )
    command.add_argument(
        "--classes",
        type=positive,
        nargs="+",
        metavar="N",
        help="semantic ones; default: those of the size",
    )
    command.add_argument(
        "--growth",
        action="store_true",
        help="one of size, detections and classes at a time, the others at their first value: how "
        "the cost grows; each has other defaults then",
    )
    command.add_argument(
        "--outputs",
        choices=[*OUTPUT_CHOICES, "both"],
        default="both",
        help="what ours returns; Detectron2's always returns all; default: both",
    )
    command.add_argument(
        "--peers", action="store_true", help="also torchvision's Mask R-CNN and Mask2Former"
    )
    command.set_defaults(run=inference)

    command = subcommands.add_parser(
        "acceleration",
        parents=[common, models],
        help="models of Detectron2's zoo, as they are and accelerated",
    )
    command.set_defaults(run=acceleration)

    command = subcommands.add_parser(
        "export",
        parents=[common, models],
        help="an image, from pixels, by the exported ONNX graph and by both models, on a CPU",
    )
    command.add_argument(
        "--profile", action="store_true", help="also where ONNX Runtime's time goes"
    )
    command.set_defaults(run=export)

    command = subcommands.add_parser(
        "launches", help="how many operators a step and an image take, and how often they wait"
    )
    command.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    command.add_argument("--threads", type=positive, help="default: all cores")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    command.add_argument(
        "--opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys of our model, and their values",
    )
    command.set_defaults(tell=launches)

    command = subcommands.add_parser(
        "kernels", help="the dearest kernels of a training step and of an image", parents=[models]
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    command.set_defaults(tell=kernels)

    command = subcommands.add_parser("table", help="a short table of what the others have written")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    command.set_defaults(tell=table, threads=None)

    command = subcommands.add_parser(
        "plot", help="one picture of what the others have written: how many times as fast"
    )
    command.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    command.add_argument("--output", type=picture, required=True, metavar="FILE.svg|png")
    command.set_defaults(tell=plot, threads=None)

    command = subcommands.add_parser(
        "training", parents=[common, models], help="a training step, and the data path"
    )
    command.add_argument(
        "--data-images", type=positive, default=8, help="for the data path; default: 8"
    )
    command.set_defaults(run=training)

    command = subcommands.add_parser(
        "evaluation", parents=[common], help="PQ, mIoU and AP of predictions"
    )
    command.add_argument(
        "--sizes", type=size, nargs="+", default=[(480, 640), (1024, 2048)], metavar="HxW"
    )
    command.add_argument("--images", type=positive, default=6, help="of each size; default: 6")
    command.set_defaults(run=evaluation, device=torch.device("cpu"), threads=1)

    command = subcommands.add_parser(
        "loading", parents=[common], help="the annotations of a training set, of COCO's size"
    )
    command.add_argument(
        "--data-images", type=positive, default=118_287, help="default: those of COCO train"
    )
    command.set_defaults(run=loading, device=torch.device("cpu"), threads=1)

    command = subcommands.add_parser(
        "eval-only",
        parents=[common],
        help="a trained model on its dataset, from files to scores: PQ, mIoU and AP",
    )
    command.add_argument("--config-file", required=True, metavar="FILE")
    command.add_argument("--threads", type=positive, help="default: all cores")
    command.add_argument(
        "--opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys and their values, of both models; MODEL.WEIGHTS is needed",
    )
    command.set_defaults(run=eval_only, device=torch.device("cpu"))
    return parser


def main() -> int:
    args = parser().parse_args()
    use_cores(args.threads)
    tf32 = getattr(args, "precision", "fp32") == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    if "tell" in args:
        return args.tell(args)
    settings = environment(args.device)
    names = ("backbone", "precision", "detectron2_precision", "opts", "rounds", "images")
    settings |= {name: getattr(args, name) for name in names if getattr(args, name, None)}
    comparisons, peers = args.run(args)
    report(comparisons, peers, settings, args.json)
    return 0 if all(comparison.same_answer for comparison in comparisons) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        sys.exit(2)
