"""Models as ONNX: a graph and its weights, checked in onnxruntime before they are there."""

from moe_lightning.export.pair import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]
