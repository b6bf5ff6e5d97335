"""Tokens per second, and model FLOPs utilisation (MFU) over a device's peak."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from moe_lightning.callbacks.base import LayerWatch, at_log_step, compute_dtype, log_metrics, most_tokens
from moe_lightning.callbacks.clocks import StepClock, StepTotals

#: Dense bf16 and fp16 peak of devices that Lightning does not know (NVIDIA H200 datasheet), FLOP/s.
_DATASHEET = {"NVIDIA H200": 989e12}
#: A product that takes this long is the last one: no start waits for more than a second or so.
SLOW_SECONDS = 0.05


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: a GPU's datasheet figure for `dtype`, else the best of a few matrix products measured here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if dtype in (torch.bfloat16, torch.float16) and name in _DATASHEET:
            return _DATASHEET[name]
        known = get_available_flops(device, dtype)
        if known:
            return float(known)
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of products of growing size, up to the first that takes SLOW_SECONDS.

    A processor without arithmetic of this type takes seconds for 1024^3; its rate is known long before.
    """
    best = 0.0
    for size in (64, 128, 256, 512, 1024):
        seconds = [_product_seconds(device, dtype, size)]
        if seconds[0] < SLOW_SECONDS:  # else too slow to be repeated; the first holds what is done once
            seconds += [_product_seconds(device, dtype, size) for _ in range(4)]
        best = max(best, 2 * size**3 / min(seconds))
        if min(seconds) >= SLOW_SECONDS:
            break
    return best


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    _synchronize(device)
    began = time.perf_counter()
    a @ a
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput(LayerWatch):
    """Logs throughput/tokens_per_s (all ranks) and throughput/mfu, over the time of training steps alone.

    What is no part of a step (validation, checkpoints, exports, other callbacks) does not count, see `StepClock`.
    Tokens are those that the MoE layers see, or the embeddings of a module without MoE layers.

    MFU is the useful FLOPs of a step (three times a forward pass; of the experts, the K chosen) over peak FLOPs
    (PaLM, arXiv:2204.02311, appendix B). It is logged where a part of the module has `flops_per_token(seq_len)`.

    Args:
        enabled: off costs nothing.
        peak_flops: FLOP/s of one device; None: the GPU's datasheet, or for a CPU a matrix product measured at the
            start.
    """

    def __init__(self, enabled: bool = True, peak_flops: float | None = None) -> None:
        super().__init__()
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"throughput: peak_flops must be positive, got peak_flops={peak_flops}")
        self.enabled = enabled
        self.peak = peak_flops
        self._network: Any = None
        self._clock: StepClock | None = None
        self._reset()

    def _reset(self) -> None:
        self._logged = StepTotals()
        self._tokens: deque[int] = deque()  # of each step that is not logged yet
        self._first: tuple[int, float] | None = None
        self._run_tokens, self._run_seconds = 0, 0.0
        self._seq_len = 1

    @override
    def to_watch(self, pl_module: L.LightningModule) -> Sequence[nn.Module]:
        """The MoE layers; without any, the embeddings."""
        if not self.enabled:
            return []
        return super().to_watch(pl_module) or [m for m in pl_module.modules() if isinstance(m, nn.Embedding)]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset()
        if not self.enabled:
            return
        self._network = next((m for m in pl_module.modules() if hasattr(m, "flops_per_token")), None)
        if self._network is not None and self.peak is None:
            self.peak = peak_flops(trainer.strategy.root_device, compute_dtype(trainer))
        if not self.watching:
            _say_unknown(pl_module)
            return
        self._clock = StepClock.attach(trainer)
        self._logged = self._clock.totals()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._clock is None:
            return
        self._tokens.append(most_tokens(self.calls))
        if self.calls and self.calls[0].shape:
            self._seq_len = self.calls[0].shape[-1]
        if at_log_step(trainer):
            self._log(trainer, pl_module, self._clock.totals())

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_clock_go(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_clock_go(trainer)

    def run_tokens_per_second(self) -> float | None:
        """Mean over the logged part of the run, one rank; None if nothing was logged.

        The first interval, in which libraries and kernels are loaded, counts only where there is no other.
        """
        if self._first is None:
            return None
        tokens, seconds = (self._run_tokens, self._run_seconds) if self._run_seconds else self._first
        return tokens / seconds

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, totals: StepTotals) -> None:
        """Of the steps that the device has finished since the last time."""
        finished = totals.since(self._logged)
        if not finished.milliseconds:
            return
        tokens = sum(self._tokens.popleft() for _ in range(finished.steps))
        self._logged = totals
        if not tokens:
            _say_unknown(pl_module)
            self._clock = None
            return
        seconds = finished.milliseconds / 1e3
        rate = tokens / seconds
        metrics = {"throughput/tokens_per_s": rate * trainer.world_size}
        if self._network is not None and self.peak:
            metrics["throughput/mfu"] = rate * 3 * self._network.flops_per_token(self._seq_len) / self.peak
        log_metrics(trainer, metrics)
        if self._first is None:
            self._first = tokens, seconds
        else:
            self._run_tokens += tokens
            self._run_seconds += seconds

    def _let_clock_go(self, trainer: L.Trainer) -> None:
        StepClock.detach(trainer)
        self._clock = None


def _say_unknown(module: L.LightningModule) -> None:
    rank_zero_warn(
        "throughput: a module must call MoE layers or embeddings for its tokens to be counted, got "
        f"{type(module).__name__}, which calls none; no tokens/s is logged"
    )
