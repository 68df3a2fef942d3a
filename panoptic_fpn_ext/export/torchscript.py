"""A trained model as a TorchScript file, and running such a file."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError
from .onnx_file import description, graph_of
from .supported import check_exportable, naming_the_part

DESCRIPTION = "description.json"


def export_torchscript(cfg: CfgNode, model: nn.Module, file: str | os.PathLike) -> None:
    """Write a model as one TorchScript function, from pixels to segments.

    It takes the image (H, W, 3) uint8 and the thresholds, (1,) float64 each, and returns a tuple.
    The file's extra file ``description.json`` has their names and the metadata of the ONNX file.

    Args:
        cfg, model, file: see :func:`export_onnx`.

    Raises:
        UserError: see there.
    """
    check_exportable(cfg)
    graph = graph_of(cfg, model)
    thresholds = [torch.tensor([value]).double() for value in graph.thresholds.values()]
    example = torch.randint(0, 256, (96, 120, 3), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings(), naming_the_part(cfg, model):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, (example, *thresholds), check_trace=False)
    facts = description(cfg, model, graph)
    facts["output_names"] = json.dumps(graph.output_names)
    partial = Path(file).with_name(f".{Path(file).name}.unfinished")
    try:
        torch.jit.save(traced, str(partial), _extra_files={DESCRIPTION: json.dumps(facts)})
        partial.replace(file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--output {file}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


class TorchScriptModel:
    """An exported model in PyTorch, without this package or Detectron2."""

    def __init__(self, file: str | os.PathLike) -> None:
        files = {DESCRIPTION: ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.function = torch.jit.load(str(file), map_location="cpu", _extra_files=files)
        facts = json.loads(files[DESCRIPTION])
        self.output_names = json.loads(facts["output_names"])
        self.thresholds = json.loads(facts["thresholds"])

    @torch.no_grad()
    def __call__(self, image: np.ndarray, **thresholds: float) -> dict[str, np.ndarray]:
        """The outputs of an image (H, W, 3) uint8, by name."""
        values = ({**self.thresholds, **thresholds}[name] for name in self.thresholds)
        inputs = [torch.tensor([value], dtype=torch.float64) for value in values]
        outputs = self.function(torch.from_numpy(np.array(image)), *inputs)
        return {k: v.numpy() for k, v in zip(self.output_names, outputs, strict=True)}
