"""What a run shows in a terminal or a log file: the model's parts, how far training is, generated text."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich import get_console
from rich import print as rich_print
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.base import at_log_step
from moe_lightning.callbacks.throughput import Throughput
from moe_lightning.utils.checks import check_not_negative


class ProgressBar(RichProgressBar):
    """Lightning's rich bar; where the output is no terminal, a line every so often.

    Metrics are read only where they are logged: reading one waits for the device.

    Args:
        refresh_rate: bars are drawn this often per second; 0: nothing is shown, no lines either.
        leave: keep the finished bar of an epoch.
        theme: styles of the bar.
        console_kwargs: of rich's Console.
        line_every_seconds: between two lines without a terminal, at a step that is logged; validation has a line too.
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme = RichProgressBarTheme(),  # noqa: B008  as Lightning has it
        console_kwargs: dict[str, Any] | None = None,
        line_every_seconds: float = 30.0,
    ) -> None:
        check_not_negative("progress_bar", "line_every_seconds", line_every_seconds)
        super().__init__(refresh_rate, leave, theme, console_kwargs)
        self._line_every_seconds = line_every_seconds
        self._lines = False
        self._first_step, self._began = 0, 0.0
        self._next_line = 0.0
        self._total: float = math.inf

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        if self.is_enabled and not console.is_terminal and not console.is_jupyter:
            self.disable()
            self._lines = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step, self._began = trainer.global_step, time.monotonic()
        self._next_line = self._began
        self._total = trainer.estimated_stepping_batches

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._lines and at_log_step(trainer) and time.monotonic() >= self._next_line:
            self._write_line(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._lines and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_line(trainer)

    def _write_line(self, trainer: L.Trainer) -> None:
        now, step = time.monotonic(), trainer.global_step
        self._next_line = now + self._line_every_seconds
        parts = [f"{name} {float(value):.3f}" for name, value in trainer.progress_bar_metrics.items()]
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        if throughput is not None and (rate := throughput.run_tokens_per_second()) is not None:
            parts.append(f"{rate * trainer.world_size:,.0f} tokens/s")
        if (left := self._seconds_left(trainer, now)) is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        total = "" if math.isinf(self._total) else f" of {self._total:.0f}"
        print(f"step {step}{total}: {', '.join(parts)}", flush=True)  # a log file is written in blocks otherwise

    def _seconds_left(self, trainer: L.Trainer, now: float) -> float | None:
        """By the pace since the start, validation and checkpoints included; None if it cannot be known."""
        done = trainer.global_step - self._first_step
        left = (self._total - trainer.global_step) * (now - self._began) / done if done else math.inf
        for timer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(timer, Timer) and (seconds := timer.time_remaining()) is not None:
                left = min(left, seconds)
        return None if math.isinf(left) else max(left, 0.0)

    @override
    def _update_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if not trainer.training or trainer._logger_connector.should_update_logs:
            super()._update_metrics(trainer, pl_module, *args, **kwargs)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        """Without the number of epochs where it is unbounded."""
        if self.trainer.max_epochs == -1:
            return f"Epoch {current_epoch}"
        return super()._get_train_description(current_epoch)


class ModelSummary(RichModelSummary):
    """Lightning's rich table without the columns that do not apply here.

    Every module is in training mode, and FLOPs are counted only for modules with an example input; see throughput/mfu.
    """

    @override
    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        columns = {name.strip(): values for name, values in summary_data if name not in ("Mode", "FLOPs")}
        table = Table(header_style=summarize_kwargs.get("header_style", "bold"))
        for name in columns:
            table.add_column(name, justify="right" if "Params" in name else "left", no_wrap=name == "Name")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        console = get_console()
        console.print(table)
        frozen = total_parameters - trainable_parameters
        console.print(
            f"{get_human_readable_count(total_parameters).strip()} parameters, {model_size:,.1f} MB"
            + (f", {get_human_readable_count(frozen).strip()} of them frozen" if frozen else ""),
            highlight=False,
        )


class GenerationPrinter(L.Callback):
    """Prints each prompt with its continuation, on rank zero; as ids where no datamodule can decode them."""

    @override
    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        decode = data.decode if hasattr(data, "decode") else _numbers
        for ids, prompt_ids in zip(outputs, batch, strict=True):
            text = Text(decode(prompt_ids), style="bold")
            text.append(decode(ids[prompt_ids.numel() :]), style="not bold")
            rich_print(Panel(text, title=f"prompt {batch_idx + 1}"))


def _numbers(ids: Tensor) -> str:
    return "".join(f"{token} " for token in ids.tolist())
