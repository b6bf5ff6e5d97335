"""The run and its result: run.json and summary.json in the folder of its logs, the second printed when it ends."""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from moe_lightning.callbacks.base import compute_dtype, moe_layers, run_folder, tensorboard_loggers
from moe_lightning.callbacks.checkpoints.graceful_stop import Stopped
from moe_lightning.callbacks.checkpoints.onnx_export import OnnxExport
from moe_lightning.callbacks.exchange_timing import ExchangeTiming
from moe_lightning.callbacks.expert_load import ExpertLoadMonitor
from moe_lightning.callbacks.router_timing import RouterTiming
from moe_lightning.callbacks.throughput import Throughput
from moe_lightning.routers import router_name
from moe_lightning.utils.files import atomic_write
from moe_lightning.utils.provenance import provenance

#: ru_maxrss counts KiB on Linux, bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class RunSummary(L.Callback):
    """Perplexity, the router's time split, load skew, throughput, the checkpoint and the tensorboard command.

    Args:
        enabled: off prints and writes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._began: float | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say what starts here, while no strategy has cut the model yet."""
        self._began = None
        if not self.enabled or stage != "fit":
            return
        folder = _folder(trainer)
        if folder is not None and trainer.is_global_zero:
            content = {**provenance(), "ranks": trainer.world_size, **_sizes(pl_module)}
            _write(folder / "run.json", content)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that a signal stopped is summed up like any other."""
        if isinstance(exception, Stopped) and self._began:
            self.on_fit_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The load is a collective, so all ranks take part; rank zero prints and writes."""
        if not self.enabled:
            return
        seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        summary = summarise(trainer, pl_module, seconds)
        folder = _folder(trainer)
        if not trainer.is_global_zero:
            return
        _print(summary)
        if summary["checkpoint"]:
            print(f"checkpoint:  {summary['checkpoint']}")
        if summary["onnx"]:
            print(f"onnx:        {summary['onnx']}")
        if folder is not None:
            _write(folder / "summary.json", summary)
            path = shlex.quote(os.path.relpath(folder))
            shown = f"look at it:  tensorboard --logdir {path} --host 127.0.0.1"
            print(shown if tensorboard_loggers(trainer) else f"logs:        {path}")


def _write(path: Path, content: dict[str, Any]) -> None:
    """A run does not end for it."""
    try:
        atomic_write(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        rank_zero_warn(f"run_summary: {path} is not written, got {error.strerror}; the run goes on")


def _folder(trainer: L.Trainer) -> Path | None:
    """Where a run's logs are, made; a collective. None without a logger or in fast_dev_run."""
    folder = run_folder(trainer)
    if folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sizes(module: L.LightningModule) -> dict[str, int]:
    """Parameters in all, and those that compute one token."""
    total = sum(p.numel() for p in module.parameters())
    return {
        "parameters": total,
        "active_parameters": total - sum(layer.inactive_parameters for layer in moe_layers(module)),
    }


def summarise(trainer: L.Trainer, pl_module: L.LightningModule, seconds: float) -> dict[str, Any]:
    """The figures of a run as plain types; None where a callback is off or had nothing to see."""
    timing, load, rate = _find(trainer, RouterTiming), _find(trainer, ExpertLoadMonitor), _find(trainer, Throughput)
    exchange = _find(trainer, ExchangeTiming)
    layers = moe_layers(pl_module)
    times = timing.run_times() if timing else None
    skew = load.run_load() if load else None
    experts = layers[0].computed_by(compute_dtype(trainer), trainer.strategy.root_device) if layers else None
    checkpoints, export = trainer.checkpoint_callback, _find(trainer, OnnxExport)
    best = ""
    if isinstance(checkpoints, ModelCheckpoint):
        best = checkpoints.best_model_path or checkpoints.last_model_path
    onnx = export.folder_of(best) if export else None
    return {
        "router": router_name(layers[0].router) if layers else None,
        "experts": experts,
        "steps": trainer.global_step,
        "seconds": seconds,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "tokens_per_second": rate.run_tokens_per_second() if rate else None,
        "step_ms": times.step_milliseconds if times else None,
        "route_share": times.route_share if times else None,
        "times_ms": times.milliseconds if times else None,
        "forward_ms": times.forward if times else None,
        "backward_ms": times.backward if times else None,
        "exchange": {name: each.figures() for name, each in exchange.run_times().items()} if exchange else {},
        "max_over_mean_L": skew.max_over_mean_L.tolist() if skew else None,
        "cv_L": skew.cv_L.tolist() if skew else None,
        "checkpoint": os.path.relpath(best) if best else None,
        "onnx": os.path.relpath(onnx) if onnx else None,
    }


def _find(trainer: L.Trainer, kind: type) -> Any:
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


def _print(summary: dict[str, Any]) -> None:
    console = Console()
    result = _table("result")
    for name in ("val/loss", "val/perplexity"):
        if name in summary["metrics"]:
            result.add_row(name, f"{summary['metrics'][name]:.3f}")
    if summary["tokens_per_second"]:
        result.add_row("tokens/s per rank", f"{summary['tokens_per_second']:,.0f}")
    if summary["experts"]:
        result.add_row("experts by", summary["experts"])
    result.add_row("training with validation, s", f"{summary['seconds']:.0f}")
    result.add_row("peak memory, GB", f"{summary['peak_memory_gb']:.2f}")
    console.print(result)
    if summary["times_ms"]:
        columns = "forward, ms", "backward, ms", "together, ms", "share of step"
        times = _table(f"router time: {summary['router']}", *columns)
        for name, forward in summary["forward_ms"].items():
            style = "bold" if name == "T_route" else None
            cells = [f"{forward:.2f}"]
            if name in summary["backward_ms"]:  # which has of T_pack the sum alone
                together = summary["times_ms"][name]
                cells += [f"{summary['backward_ms'][name]:.2f}", f"{together:.2f}"]
                cells += [f"{together / summary['step_ms']:.1%}"]
            times.add_row(name, *cells, style=style)
        times.add_row("step", "", "", f"{summary['step_ms']:.2f}", "100.0%")
        console.print(times)
    if summary["exchange"]:
        exchange = _table("T_comm: exchange between ranks", "total, ms", "exposed, ms", "GB/s")
        for name, figures in summary["exchange"].items():
            exchange.add_row(name, *(f"{value:.2f}" for value in figures.values()))
        console.print(exchange)
    if summary["cv_L"]:
        load = _table("load skew", "mean of layers", "worst layer")
        peaks = summary["max_over_mean_L"]
        for name, values in (("max/mean", peaks), ("MaxVio", [p - 1 for p in peaks]), ("CV", summary["cv_L"])):
            load.add_row(name, f"{sum(values) / len(values):.3f}", f"{max(values):.3f}")
        console.print(load)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in ("", *(columns or ("",))):
        table.add_column(column, justify="right" if column else "left")
    return table
