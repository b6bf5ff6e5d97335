"""Lightning callbacks: what a router costs, how it loads the experts, and what a run needs to be trusted."""

from moe_lightning.callbacks.checkpoints.exact_resume import ExactResume
from moe_lightning.callbacks.checkpoints.graceful_stop import GracefulStop
from moe_lightning.callbacks.checkpoints.onnx_export import OnnxExport
from moe_lightning.callbacks.checkpoints.run_checkpoint import RunCheckpoint
from moe_lightning.callbacks.console import GenerationPrinter, ModelSummary, ProgressBar
from moe_lightning.callbacks.exchange_timing import ExchangeTiming
from moe_lightning.callbacks.expert_load import ExpertLoadMonitor
from moe_lightning.callbacks.loggers import LogGuard, TensorBoardLayout
from moe_lightning.callbacks.router_guard import RouterGuard
from moe_lightning.callbacks.router_timing import RouterTiming
from moe_lightning.callbacks.run_summary import RunSummary
from moe_lightning.callbacks.throughput import Throughput
from moe_lightning.callbacks.trace import Trace

__all__ = [
    "ExactResume",
    "ExchangeTiming",
    "ExpertLoadMonitor",
    "GenerationPrinter",
    "GracefulStop",
    "LogGuard",
    "ModelSummary",
    "OnnxExport",
    "ProgressBar",
    "RouterGuard",
    "RouterTiming",
    "RunCheckpoint",
    "RunSummary",
    "TensorBoardLayout",
    "Throughput",
    "Trace",
]
