"""Models as ONNX: a graph and its weights, checked in onnxruntime before they are there."""

from typing import TYPE_CHECKING, Any

from moe_lightning.utils.checks import check_installed

if TYPE_CHECKING:
    from moe_lightning.export.model_files import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]


def check_packages() -> None:
    """Raise ValueError that says how to get what an export needs, where it is not installed."""
    check_installed("export", "export", "onnx", "onnxruntime", "onnxscript")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_packages()
    from moe_lightning.export import model_files

    return getattr(model_files, name)
