"""What a run's loggers need: a layout of TensorBoard's scalars, and a full disk that does not end training."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from moe_lightning.callbacks.base import moe_layers, tensorboard_loggers
from moe_lightning.callbacks.exchange_timing import ExchangeTiming
from moe_lightning.callbacks.expert_load import ExpertLoadMonitor
from moe_lightning.callbacks.router_timing import RouterTiming
from moe_lightning.callbacks.throughput import Throughput
from moe_lightning.expert_parallel.collectives import HasCommHook
from moe_lightning.layers.phases import FORWARD_ONLY, TIMES
from moe_lightning.utils.files import os_error_of


class LogGuard(L.Callback):
    """Warns once per logger that its disk is full, and goes on; what fits later is written again.

    TensorBoard's thread would end at the first error, and with it training; a record that was written in part would
    hide all after it from every reader.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
                method = getattr(logger, name)
                if not isinstance(method, functools.partial):  # in a second fit it is there already
                    setattr(logger, name, functools.partial(_tolerant, logger, method))
        for logger in tensorboard_loggers(trainer):
            records = logger.experiment._get_file_writer().event_writer._async_writer._writer
            if not isinstance(records._writer, _EventFile):
                records._writer = _EventFile(records._writer)


class _EventFile:
    """Takes whole records or nothing."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._path = os.fsdecode(file.filename)

    def write(self, record: bytes) -> None:
        size = os.path.getsize(self._path)
        try:
            self._file.write(record)
        except OSError as error:
            os.truncate(self._path, size)
            _warn(self._path, str(error.strerror))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _tolerant(logger: Logger, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return method(*arguments, **named)
    except Exception as error:
        cause = os_error_of(error)
        if cause is None:
            raise
        _warn(str(cause.filename or logger.log_dir), str(cause.strerror))
        return None


@functools.cache  # once per file and reason
def _warn(path: str, reason: str) -> None:
    rank_zero_warn(f"logger: {path} cannot be written, got {reason}; training goes on, and what is logged is lost")


#: Title of a chart to the regular expressions of its tags; a chart has one unit.
Charts = dict[str, list[str]]


class TensorBoardLayout(L.Callback):
    """Writes the layout when training starts: a category for each callback that is on and has something to log."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Here the strategy has set its dispatchers, so whether there are exchanges is known."""
        layout = {
            category: {title: ["Multiline", tags] for title, tags in charts.items()}
            for category, charts in _categories(trainer, pl_module).items()
        }
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_custom_scalars(layout)


#: T_route and the times that it is the sum of.
_ROUTE = [name for name, phases in TIMES.items() if set(phases) <= set(TIMES["T_route"])]


def _times(direction: str, names: Iterable[str]) -> str:
    return f"router_time/{direction}/({'|'.join(names)})_ms$"


def _categories(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Charts]:
    layers = moe_layers(module)
    on = {type(callback) for callback in trainer.callbacks if getattr(callback, "enabled", False)}  # type: ignore[attr-defined]
    categories: dict[str, Charts] = {"loss": {"cross-entropy, nats per token": ["train/loss$", "val/loss$"]}}
    if layers:
        categories["loss"]["balancing losses"] = ["train/((sequence_)?balance|z)_loss$"]
    if layers and RouterTiming in on:
        categories["router time"] = {
            "T_route forward by part, ms": [_times("forward", _ROUTE)],
            "T_route backward by part, ms": [_times("backward", [name for name in _ROUTE if name not in FORWARD_ONLY])],
            "T_route, experts and step, ms": [
                _times("(forward|backward)", ["T_route", *(name for name in TIMES if name not in _ROUTE)]),
                "router_time/step_ms$",
            ],
            "T_route, share of the step": ["router_time/T_route_share$"],
        }
    if layers and ExpertLoadMonitor in on:
        categories["load"] = {
            "max / mean": ["expert_load(_val)?/(rank_)?max_over_mean$"],
            "MaxVio": ["expert_load(_val)?/max_violation$"],
            "CV": ["expert_load(_val)?/(rank_)?cv$"],
            "dropped share": ["expert_load(_val)?/dropped$"],
        }
    if ExchangeTiming in on and any(isinstance(layer.dispatcher, HasCommHook) for layer in layers):
        categories["exchange"] = {
            "total, ms per micro-batch": ["exchange/.*_total_ms$"],
            "exposed, ms per micro-batch": ["exchange/.*_exposed_ms$"],
            "GB/s": ["exchange/.*_gb_per_s$"],
        }
    if Throughput in on:
        categories["throughput"] = {"tokens per second": ["throughput/tokens_per_s$"]}
    return categories
