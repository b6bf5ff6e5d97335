"""A trace of a few training steps by torch.profiler, with the phases of every MoE layer as named ranges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from moe_lightning.callbacks.stage import moe_layers
from moe_lightning.callbacks.step_trace import FOLDER, StepTrace
from moe_lightning.utils.checks import check_not_negative, check_sizes


class Trace(L.Callback):
    """Writes <dirpath>/rank<r>.<time>.pt.trace.json.gz, one file a rank: ops, kernels, and ranges moe/L<layer>/<phase>.

    A step is a micro-batch. Until the traced ones the layers carry nothing; behind the last one the profiler is gone.
    Writing takes seconds, which no other callback's times include. docs/profiling.md says how to read it.

    Args:
        enabled: off costs nothing.
        dirpath: folder of the files.
        wait: steps before the profiler starts: the first ones load libraries.
        warmup: steps that it runs without keeping anything; at least 1, as its own start is slow.
        active: steps that are traced.
    """

    def __init__(
        self, enabled: bool = False, dirpath: str = FOLDER, wait: int = 5, warmup: int = 2, active: int = 3
    ) -> None:
        check_not_negative("trace", "wait", wait)
        check_sizes("trace", warmup=warmup, active=active)
        self.enabled = enabled
        self.dirpath = dirpath
        self.wait, self.warmup, self.active = wait, warmup, active
        self._steps: StepTrace | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Only one profiler can run in a process."""
        if self.enabled and isinstance(trainer.profiler, PyTorchProfiler):  # type: ignore[attr-defined]
            raise ValueError(
                "trace: torch's profiler can run once at a time, got trace.enabled=true and a PyTorchProfiler of the "
                "trainer's; leave one out"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count steps from here."""
        if self.enabled:
            worker, device = f"rank{trainer.global_rank}", trainer.strategy.root_device
            steps = self.wait, self.warmup, self.active
            self._steps = StepTrace(moe_layers(pl_module), device, self.dirpath, worker, *steps)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the marks in for a traced micro-batch."""
        if self._steps is not None:
            self._steps.begin_step()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take them out; write the file behind the last one."""
        if self._steps is not None and self._written(self._steps.end_step) and self._steps.done:
            self._end()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that ends early keeps what it has."""
        recorded = self._steps is not None and self._steps.recorded
        if self._steps is not None and self._end() is None and not recorded:
            rank_zero_warn(
                f"trace: training must go on for more than wait + warmup steps, got wait={self.wait}, "
                f"warmup={self.warmup} and no step behind them: nothing is written; lower them"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same when it breaks off."""
        if self._steps is not None:
            self._end()

    def _written(self, end: Callable[[], None]) -> bool:
        """Whether the file could be, if it was to be; training goes on without it."""
        try:
            end()
        except (OSError, json.JSONDecodeError) as error:  # the profiler cuts the file short without a word
            reason = error.strerror if isinstance(error, OSError) else "no room for all of it"
            rank_zero_warn(
                f"trace: {self.dirpath} cannot be written to, got {reason}; training goes on without a trace"
            )
            self._steps = None
            return False
        return True

    def _end(self) -> Path | None:
        assert self._steps is not None
        steps = self._steps
        path = steps.path if self._written(steps.stop) else None
        self._steps = None
        if path is not None:
            rank_zero_info(f"trace: {path}; open it at https://ui.perfetto.dev")
        return path
