"""A trained model as an ONNX file, and running such a file."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..data.category_lines import label_space_of
from ..data.label_space import thing_sem_seg_ids
from ..errors import UserError
from .graph import PanopticGraph
from .supported import check_exportable, naming_the_part

OPSETS = (16, 20)
"""The first whose RoIAlign is Detectron2's; the last of PyTorch's exporter of traces."""
IR_VERSION = 8  # what runtimes of opset 16 read
RUNTIME = (1, 14)  # the oldest that it was run in
INSTALL = "pip install onnx onnxruntime, or pip install 'panoptic_fpn_ext[export]'"

_AXES = {
    "panoptic_seg": ("height", "width"),
    "sem_seg": ("height", "width"),
    "masks": ("instances", "height", "width"),
}

logger = logging.getLogger(__name__)


def export_onnx(
    cfg: CfgNode, model: nn.Module, file: str | os.PathLike, *, opset: int = OPSETS[0]
) -> None:
    """Write a model as one ONNX graph, from pixels to segments.

    Inputs, outputs and metadata are listed in docs/DEPLOYMENT.md.

    Args:
        cfg: of the model, see :func:`~panoptic_fpn_ext.config.resolve_config`.
        model: with its weights, on the CPU, in inference.
        file: what to write, whole or not at all.
        opset: of ONNX's operators, see :data:`OPSETS`.

    Raises:
        UserError: onnx is not installed; the opset; a part of the model that cannot be exported;
            a file that cannot be written.
    """
    onnx = needed("onnx")
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise UserError(
            f"--opset {opset}: {OPSETS[0]} to {OPSETS[1]}; before, ONNX has no RoIAlign as in "
            "Detectron2, and after, PyTorch's exporter has no traces"
        )
    check_exportable(cfg)
    graph = graph_of(cfg, model)
    defaults = {name: torch.tensor([v]).double() for name, v in graph.thresholds.items()}
    example = torch.randint(0, 256, (96, 120, 3), dtype=torch.uint8)
    file = Path(file)
    partial = file.with_name(f".{file.name}.unfinished")
    try:
        with torch.no_grad(), warnings.catch_warnings(), naming_the_part(cfg, model):
            warnings.simplefilter("ignore")  # of tracing, which docs and tests answer
            torch.onnx.export(
                graph,
                (example, *defaults.values()),
                str(partial),
                opset_version=opset,
                input_names=["image", *defaults],
                output_names=graph.output_names,
                dynamic_axes=_dynamic_axes(graph.output_names),
                **_OLDER_EXPORTER,
            )
        content = onnx.load(str(partial))
        _name_once(content.graph)
        _make_optional(onnx, content, defaults)
        content.ir_version = IR_VERSION
        content.producer_name = "panoptic_fpn_ext"
        onnx.helper.set_model_props(content, description(cfg, model, graph, opset))
        onnx.checker.check_model(content)
        onnx.save(content, str(partial))
        partial.replace(file)
    except OSError as error:
        raise UserError(f"--output {file}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def graph_of(cfg: CfgNode, model: nn.Module) -> PanopticGraph:
    """The graph of a model, with the test size of a config."""
    test_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return PanopticGraph(model, test_size=test_size).eval()


def needed(name: str) -> ModuleType:
    """A package of the extra ``export``.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        module = __import__(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed ({error}): {INSTALL}") from error
    if name == "onnxruntime":
        version = tuple(int(x) for x in module.__version__.split(".")[:2])
        if version < RUNTIME:
            wanted = ".".join(map(str, RUNTIME))
            raise UserError(f"onnxruntime {module.__version__} is older than {wanted}: {INSTALL}")
    return module


# The newer exporter does not get through the data-dependent branches of Detectron2's R-CNN.
_OLDER_EXPORTER = {"dynamo": False} if "dynamo" in torch.onnx.export.__code__.co_varnames else {}


def _dynamic_axes(output_names: Sequence[str]) -> dict[str, dict[int, str]]:
    axes = {"image": {0: "height", 1: "width"}}
    for name in output_names:
        default = ("segments",) if name.startswith("segment_") else ("instances",)
        axes[name] = dict(enumerate(_AXES.get(name, default)))
    return axes


def _name_once(graph: Any) -> None:
    """Where weights of one value have several names, Identity nodes, let all nodes use the first:
    quantizers look for weights behind no node."""
    weights = {weight.name for weight in graph.initializer}
    first = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in weights
    }
    nodes = [node for node in graph.node if not set(node.output) & first.keys()]
    del graph.node[:]
    graph.node.extend(nodes)
    _rename_inputs(graph, first)


def _rename_inputs(graph: Any, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_inputs(attribute.g, names)


def _make_optional(onnx: ModuleType, model: Any, defaults: Mapping[str, torch.Tensor]) -> None:
    """Give inputs defaults: initializers of the same name, which callers may override."""
    there = {value.name for value in model.graph.input}
    for name, value in defaults.items():
        if name in there:
            model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))


def description(
    cfg: CfgNode, model: nn.Module, graph: PanopticGraph, opset: int | None = None
) -> dict[str, str]:
    """What users of an exported model need to know, as text: JSON where it is not one word."""
    from .. import __version__  # late: the package imports this one

    versions = {
        "panoptic_fpn_ext": __version__,
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }
    if opset is not None:
        versions["opset"] = str(opset)
    facts: dict[str, Any] = {
        "outputs": list(cfg.MODEL.PANOPTIC_FPN.OUTPUTS),
        "test_size": list(graph.test_size),
        "thresholds": graph.thresholds,
        "versions": versions,
        **_categories(cfg),
    }
    return {
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "input_format": cfg.INPUT.FORMAT,
        "weights_sha256": weights_hash(model),
        **{name: json.dumps(value) for name, value in facts.items()},
    }


def _categories(cfg: CfgNode) -> dict[str, Any]:
    """The label space: thing categories and semantic classes in the order of their numbers."""
    metadata = None
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            if MetadataCatalog.get(name).get("stuff_classes") is not None:
                metadata = MetadataCatalog.get(name)
                break
        except UserError:  # annotations that are not here
            continue
    if metadata is None:
        return {"thing_classes": [], "semantic_classes": [], "label_space": "unknown"}
    of_things = thing_sem_seg_ids(metadata)
    things, semantic = (
        [
            {"id": ids.get(k, k), "name": name, "color": list(colors[k])}
            for k, name in enumerate(metadata.get(f"{kind}_classes", ()))
            for ids in [_dataset_ids(metadata, kind)]
            for colors in [metadata.get(f"{kind}_colors", None) or _GREY]
        ]
        for kind in ("thing", "stuff")
    )
    for number, semantic_class in enumerate(semantic):
        semantic_class["isthing"] = number in of_things.values()
    space = cfg.MODEL.get("LABEL_SPACE", "")
    if not space and "stuff_dataset_id_to_contiguous_id" in metadata.as_dict():
        space = label_space_of(metadata)
    return {
        "thing_classes": things,
        "semantic_classes": semantic,
        "thing_sem_seg_ids": [of_things[k] for k in sorted(of_things)],
        "label_space": space or "unknown",
    }


class _Grey:
    def __getitem__(self, place: int) -> tuple[int, int, int]:
        return (128, 128, 128)


_GREY = _Grey()


def _dataset_ids(metadata: Any, kind: str) -> dict[int, int]:
    ids = metadata.get(f"{kind}_dataset_id_to_contiguous_id", None) or {}
    return {place: number for number, place in ids.items()}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


class OnnxModel:
    """An exported model in ONNX Runtime."""

    def __init__(
        self,
        file: str | os.PathLike,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            file: of :func:`export_onnx`.
            threads: of an image; by default one for each core.
            providers: ONNX Runtime's, by default the CPU.
        """
        runtime = needed("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        self.session = runtime.InferenceSession(
            str(file), options, providers=providers or ["CPUExecutionProvider"]
        )
        self.output_names = [output.name for output in self.session.get_outputs()]

    def __call__(self, image: np.ndarray, **thresholds: float) -> dict[str, np.ndarray]:
        """The outputs of an image (H, W, 3) uint8, by name."""
        inputs = {name: np.array([value], np.float64) for name, value in thresholds.items()}
        outputs = self.session.run(None, {"image": image, **inputs})
        return dict(zip(self.output_names, outputs, strict=True))
