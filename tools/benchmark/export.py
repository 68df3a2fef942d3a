"""One image, from pixels to segments, by the exported ONNX graph, our model and Detectron2's."""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from torch import nn

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.export import OnnxModel, export_onnx
from panoptic_fpn_ext.export.agreement import compared, outputs_of
from panoptic_fpn_ext.export.int8 import to_int8

from .frame import by_turns
from .models import DEPTHS, SETTINGS, Scene, Setting, build_both, config
from .results import Comparison, Peer, Times

SURER = 8  # times the weights of the classifier: with random ones scores are about equal
SAME = 0.995  # share of equal pixels
SAME_INT8 = 0.8  # of equal category; random weights leave many about as good as the best
SLOWEST = 12  # kinds of nodes that are told of


def export(args: argparse.Namespace) -> tuple[list[Comparison], list[Peer]]:
    """Our model in PyTorch and as exported graphs, each against Detectron2's in PyTorch."""
    if args.device.type != "cpu":
        raise UserError("export: the graph is measured on a CPU; leave --device out")
    comparisons: list[Comparison] = []
    for setting in args.sizes or [SETTINGS["coco"]]:
        comparisons += _compare(setting, args)
    return comparisons, []


def _compare(setting: Setting, args: argparse.Namespace) -> list[Comparison]:
    cfg = config(setting, depth=DEPTHS[args.backbone], device=args.device)
    shortest, longest = min(setting.input_size), max(setting.input_size)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = shortest, longest
    detectron2, ours, our_cfg = build_both(cfg, ["MODEL.PANOPTIC_FPN.OUTPUTS", "['panoptic_seg']"])
    if args.opts:
        our_cfg.merge_from_list(args.opts)
    for model in (detectron2, ours):
        model.roi_heads.box_predictor.cls_score.weight.data *= SURER
    detectron2.eval()
    ours.eval()
    image = Scene(setting, 30, args.device).image
    # From the network's input, without resizing: all three are given the same pixels.
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).round().byte().numpy())
    resize = T.ResizeShortestEdge([shortest, shortest], longest)

    def in_pytorch(model: nn.Module) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            resized = resize.get_transform(pixels).apply_image(pixels)
            tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
            size = {"height": pixels.shape[0], "width": pixels.shape[1]}
            return outputs_of(model, {"image": tensor, **size})

        return run

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export_onnx(our_cfg, ours, file)
        in_float32 = OnnxModel(file, threads=torch.get_num_threads())
        to_int8(shutil.copy(file, Path(folder, "int8.onnx")), [pixels])
        in_int8 = OnnxModel(Path(folder, "int8.onnx"), threads=torch.get_num_threads())
        runs = [
            in_pytorch(detectron2),
            in_pytorch(ours),
            lambda: in_float32(pixels),
            lambda: in_int8(pixels),
        ]
        first, turns = by_turns([_timed(run) for run in runs], args.rounds)
        if getattr(args, "profile", False):
            _tell_profile(file, pixels, folder)
    answers = [answer for answer, _ in first]
    times = [Times.of([seconds for _, seconds in turn]) for turn in turns]
    rows = []
    names = "PyTorch", "exported ONNX graph", "exported ONNX graph, int8"
    for name, answer, ours_ms in zip(names, answers[1:], times[1:], strict=True):
        expected = {k: v for k, v in answers[0].items() if k in answer}
        agreement = compared(expected, answer)
        share = agreement.categories if name.endswith("int8") else agreement.labels
        rows.append(
            Comparison(
                f"whole image, {name}",
                str(setting),
                ours_ms=ours_ms,
                detectron2_ms=times[0],
                same_answer=share >= (SAME_INT8 if name.endswith("int8") else SAME),
                outputs="panoptic_seg",
                classes=setting.num_classes,
                agreement={
                    "labels_equal": agreement.labels,
                    "categories_equal": agreement.categories,
                },
            )
        )
    return rows


def _timed(run: Callable[[], Any]) -> Callable[[], tuple[Any, float]]:
    def timed() -> tuple[Any, float]:
        start = time.perf_counter()
        answer = run()
        return answer, time.perf_counter() - start

    return timed


def _tell_profile(file: Path, pixels: np.ndarray, folder: str) -> None:
    """Print the kinds of nodes that take longest, in the last of three runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(folder, "profile"))
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    for _ in range(3):
        session.run(None, {"image": pixels})
    events = json.loads(Path(session.end_profiling()).read_text())
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            total[event["args"]["op_name"]] += event["dur"] / 3000
    print("\n".join(f"{name:24}{ms:9.1f} ms" for name, ms in total.most_common(SLOWEST)) + "\n")
