"""Lightning callbacks: what a router costs, how it loads the experts, and what a run needs to be trusted."""

from moe_lightning.callbacks.checkpoint import RunCheckpoint
from moe_lightning.callbacks.exact_resume import ExactResume
from moe_lightning.callbacks.exchange_timing import ExchangeTiming
from moe_lightning.callbacks.expert_load import ExpertLoadMonitor
from moe_lightning.callbacks.generation_printer import GenerationPrinter
from moe_lightning.callbacks.graceful_stop import GracefulStop
from moe_lightning.callbacks.log_guard import LogGuard
from moe_lightning.callbacks.model_summary import ModelSummary
from moe_lightning.callbacks.onnx_export import OnnxExport
from moe_lightning.callbacks.progress_bar import ProgressBar
from moe_lightning.callbacks.router_guard import RouterGuard
from moe_lightning.callbacks.router_timing import RouterTiming
from moe_lightning.callbacks.run_summary import RunSummary
from moe_lightning.callbacks.tensorboard_layout import TensorBoardLayout
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
