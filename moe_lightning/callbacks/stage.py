"""What callbacks ask of a trainer."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from moe_lightning.layers import MoE


def moe_layers(module: nn.Module) -> list[MoE]:
    """The MoE layers of a model, first to last."""
    return [layer for layer in module.modules() if isinstance(layer, MoE)]


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Send figures to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=logged_step(trainer))


def tensorboard_loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Those that write here: none but on rank zero."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero]


def run_folder(trainer: L.Trainer) -> Path | None:
    """Where a run says what it is: beside its event files, whichever of its loggers writes them; a collective.

    None without a logger that has a folder.
    """
    folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    folder = trainer.strategy.broadcast(folders[0]) if folders else trainer.log_dir if trainer.loggers else None
    return None if folder is None else Path(folder)


def logged_step(trainer: L.Trainer) -> int:
    """The optimizer-step count that Lightning's own logs stand at."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def at_log_step(trainer: L.Trainer) -> bool:
    """Whether this training batch ends an optimizer step that Lightning logs."""
    accumulating = trainer.fit_loop.epoch_loop._should_accumulate()
    return trainer._logger_connector.should_update_logs and not accumulating


def product_dtype(trainer: L.Trainer) -> torch.dtype:
    """What the run's matrix products are computed in."""
    name = str(trainer.precision).split("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(name, torch.float32)


def copy_to_host(count: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """To the host without waiting; the event says when it has arrived."""
    if not count.is_cuda:
        return count, None
    pinned = torch.empty_like(count, device="cpu", pin_memory=True)
    pinned.copy_(count, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return pinned, copied


def in_backward() -> bool:
    """Whether autograd is at work on this thread: a forward pass seen now is one that it repeats."""
    return torch._C._current_graph_task_id() != -1
