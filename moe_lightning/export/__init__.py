"""Models as ONNX: a graph and its weights, checked in onnxruntime before they are there."""

from moe_lightning.utils.checks import check_installed

check_installed("export", "export", "onnx", "onnxruntime", "onnxscript")

from moe_lightning.export.model_files import Exported, export_onnx  # noqa: E402

__all__ = ["Exported", "export_onnx"]
