"""The model as one graph: for ONNX Runtime and TorchScript, from the pixels of an image to its
segments."""

from .onnx_file import OnnxModel, export_onnx, graph_of

__all__ = ["OnnxModel", "export_onnx", "graph_of"]
