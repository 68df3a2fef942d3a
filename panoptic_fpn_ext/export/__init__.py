"""The model as one graph: for ONNX Runtime and TorchScript, from the pixels of an image to its
segments."""
