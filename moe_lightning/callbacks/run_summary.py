"""What a run came to, printed when training ends."""

from __future__ import annotations

import os
import shlex

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from moe_lightning.callbacks.expert_load import ExpertLoadMonitor
from moe_lightning.callbacks.router_timing import RouterTiming
from moe_lightning.callbacks.stage import moe_layers
from moe_lightning.callbacks.throughput import Throughput


class RunSummary(L.Callback):
    """Prints perplexity, the router's time split, load skew, throughput, the checkpoint and the tensorboard command.

    Args:
        enabled: off prints nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Times are forward and backward of all layers; one table a figure's family; the load is a collective, so every rank takes part and rank zero prints."""
        if not self.enabled:
            return
        tables = [
            table for table in (_quality(trainer), _times(trainer, pl_module), _load(trainer)) if table is not None
        ]
        if trainer.is_global_zero:
            for table in tables:
                Console().print(table)
            for line in _where(trainer):
                print(line)


def _quality(trainer: L.Trainer) -> Table:
    table = _table("result")
    for name in ("val/loss", "val/perplexity"):
        if name in trainer.callback_metrics:
            table.add_row(name, f"{float(trainer.callback_metrics[name]):.3f}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput) and (rate := callback.run_tokens_per_second()):
            table.add_row("tokens/s a rank", f"{rate:,.0f}")
    return table


def _times(trainer: L.Trainer, pl_module: L.LightningModule) -> Table | None:
    timing = next((c for c in trainer.callbacks if isinstance(c, RouterTiming)), None)  # type: ignore[attr-defined]
    times = timing.run_times() if timing else None
    if times is None:
        return None
    router = type(moe_layers(pl_module)[0].router).__name__
    table = _table(f"router time: {router}", "ms a step", "share of step")
    for name in ("T_logit", "T_select", "T_pack", "T_route", "T_experts", "T_combine"):
        milliseconds = times.milliseconds[name]
        share = milliseconds / times.step_milliseconds
        table.add_row(name, f"{milliseconds:.2f}", f"{share:.1%}", style="bold" if name == "T_route" else None)
    table.add_row("step", f"{times.step_milliseconds:.2f}", "100.0%")
    return table


def _load(trainer: L.Trainer) -> Table | None:
    monitor = next((c for c in trainer.callbacks if isinstance(c, ExpertLoadMonitor)), None)  # type: ignore[attr-defined]
    load = monitor.run_load() if monitor else None
    if load is None:
        return None
    table = _table("load skew", "mean of layers", "worst layer")
    for name, values in (("max/mean", load.max_over_mean_L), ("CV", load.cv_L)):
        table.add_row(name, f"{float(values.mean()):.3f}", f"{float(values.max()):.3f}")
    return table


def _where(trainer: L.Trainer) -> list[str]:
    """Plain lines, never wrapped: they are there to be copied."""
    lines = []
    checkpoints = trainer.checkpoint_callback
    if isinstance(checkpoints, ModelCheckpoint) and checkpoints.best_model_path:
        lines.append(f"checkpoint:  {os.path.relpath(checkpoints.best_model_path)}")
    if trainer.log_dir:
        log_dir = shlex.quote(os.path.relpath(trainer.log_dir))
        lines.append(f"look at it:  tensorboard --logdir {log_dir} --host 127.0.0.1")
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in ("", *(columns or ("",))):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    return table
