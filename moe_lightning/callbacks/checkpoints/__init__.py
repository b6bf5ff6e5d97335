"""Callbacks around checkpoints: when they are written, exact resumes, runs that a signal ends, and their ONNX files."""

from moe_lightning.callbacks.checkpoints.exact_resume import ExactResume
from moe_lightning.callbacks.checkpoints.graceful_stop import GracefulStop, Stopped
from moe_lightning.callbacks.checkpoints.onnx_export import OnnxExport
from moe_lightning.callbacks.checkpoints.run_checkpoint import RunCheckpoint

__all__ = ["ExactResume", "GracefulStop", "OnnxExport", "RunCheckpoint", "Stopped"]
