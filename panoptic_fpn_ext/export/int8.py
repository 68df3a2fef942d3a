"""Exported models that compute their convolutions in int8, for CPUs."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from .onnx_file import needed

WARNING, ERROR = 2, 3  # ONNX Runtime's levels


def to_int8(file: str | os.PathLike, images: Iterable[np.ndarray]) -> None:
    """Rewrite an ONNX file: what its convolutions are given is rounded to 8 bits, by ONNX Runtime's
    quantizer.

    Args:
        file: of :func:`~.onnx_file.export_onnx`.
        images: like those that the model is for, (H, W, 3) uint8, for the ranges of values.
    """
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs: Iterator[dict[str, np.ndarray]] = ({"image": i} for i in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
        partial = Path(folder, "model.onnx")
        with _without_warnings(runtime):
            quantization.quantize_static(
                str(file),
                str(partial),
                Reader(),
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        model = onnx.load(str(partial))
        facts = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, {**facts, "precision": "int8"})
        onnx.save(model, str(partial))
        partial.replace(file)


@contextmanager
def _without_warnings(runtime: ModuleType) -> Iterator[None]:
    """Of the quantizer, about each weight that two nodes share and each input with a default."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    runtime.set_default_logger_severity(ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        runtime.set_default_logger_severity(WARNING)
