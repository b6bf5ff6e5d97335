"""Tokens a second and model FLOPs utilisation."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from moe_lightning.callbacks.peak_flops import peak_flops
from moe_lightning.callbacks.stage import at_log_step, log_metrics, product_dtype


class Throughput(L.Callback):
    """Logs throughput/tokens_per_s (all ranks) and throughput/mfu, over wall time without validation.

    What follows on a validation before the next batch, as saving a checkpoint, does not count either.

    MFU is the useful FLOPs of a step (three times a forward pass; of the experts, the K chosen) over peak FLOPs
    (PaLM, arXiv:2204.02311, appendix B). Nothing is synchronised: over an interval the GPU's queue averages out.

    Args:
        enabled: off costs nothing.
        peak_flops: FLOP/s of one device; None: the GPU's datasheet, or for a CPU a matrix product measured at the
            start.
    """

    def __init__(self, enabled: bool = True, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"throughput: peak_flops must be positive, got peak_flops={peak_flops}")
        self.enabled = enabled
        self.peak = peak_flops
        self._tokens = 0
        self._began = 0.0
        self._paused: float | None = None
        self._first: tuple[int, float] | None = None
        self._run_tokens, self._run_seconds = 0, 0.0
        self._seq_len = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the peak, start the clock."""
        if not self.enabled:
            return
        if self.peak is None:
            self.peak = peak_flops(trainer.strategy.root_device, product_dtype(trainer))
        self._began, self._paused = time.perf_counter(), None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Training goes on."""
        if self._paused is not None:
            self._began += time.perf_counter() - self._paused
            self._paused = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens; log at the interval."""
        if not self.enabled:
            return
        self._seq_len = batch.shape[1] - 1
        self._tokens += batch.shape[0] * self._seq_len
        if at_log_step(trainer):
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation does not count."""
        self._paused = time.perf_counter()

    def run_tokens_per_second(self) -> float | None:
        """Mean over the logged part of the run, one rank; None if nothing was logged.

        The first interval, in which libraries and kernels are loaded, counts only where there is no other.
        """
        if self._first is None:
            return None
        tokens, seconds = (self._run_tokens, self._run_seconds) if self._run_seconds else self._first
        return tokens / seconds

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        seconds = now - self._began
        rate = self._tokens / seconds
        metrics = {"throughput/tokens_per_s": rate * trainer.world_size}
        if hasattr(pl_module.network, "flops_per_token") and self.peak:
            flops = 3 * pl_module.network.flops_per_token(self._seq_len)  # type: ignore[operator]
            metrics["throughput/mfu"] = rate * flops / self.peak
        log_metrics(trainer, metrics)
        if self._first is None:
            self._first = self._tokens, seconds
        else:
            self._run_tokens += self._tokens
            self._run_seconds += seconds
        self._tokens, self._began = 0, now
