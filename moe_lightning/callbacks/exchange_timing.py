"""Time of the exchanges between ranks while training: all of it, and what was not hidden behind other work."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import lightning as L
import torch
from typing_extensions import override

from moe_lightning.callbacks.base import at_log_step, log_metrics, moe_layers
from moe_lightning.callbacks.clocks import CudaStamp, HostStamp, Stamp
from moe_lightning.expert_parallel.collectives import Comm, CommEvent, HasCommHook
from moe_lightning.utils.checks import check_sizes


class ExchangeTimes(NamedTuple):
    """Of one direction (dispatch or combine, forward or backward), means of a timed micro-batch over all layers."""

    total_ms: float
    """From the start of a transfer to its end, other work beside it included on a CPU."""
    exposed_ms: float
    """What the computing stream waited."""
    megabytes: float
    """Received by this rank from others."""

    def figures(self) -> dict[str, float]:
        """What is shown of it, by name."""
        return {
            "total_ms": self.total_ms,
            "exposed_ms": self.exposed_ms,
            "gb_per_s": self.megabytes / self.total_ms if self.total_ms else 0.0,
        }


class ExchangeTiming(L.Callback):
    """Logs exchange/<direction>_total_ms, _exposed_ms and _gb_per_s under a strategy that spreads experts.

    A micro-batch in `every_n_batches` is timed, on rank zero's own clock; between them nothing is watched. On a GPU the
    times are CUDA events, the end of a transfer taken on a stream of its own, and are read only once they have passed.

    Args:
        enabled: off costs nothing.
        every_n_batches: how often a micro-batch is timed.
    """

    def __init__(self, enabled: bool = True, every_n_batches: int = 10) -> None:
        check_sizes("exchange_timing", every_n_batches=every_n_batches)
        self.enabled = enabled
        self.every_n_batches = every_n_batches
        self._dispatchers: list[HasCommHook] = []
        self._batches = 0
        self._watch = _Watch()
        self._run, self._interval = _Totals(), _Totals()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dispatchers = [layer.dispatcher for layer in moe_layers(pl_module)]
        self._dispatchers = [d for d in dispatchers if isinstance(d, HasCommHook)] if self.enabled else []
        self._batches, self._watch = 0, _Watch()
        self._run, self._interval = _Totals(), _Totals()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._dispatchers and self._batches % self.every_n_batches == min(1, self.every_n_batches - 1):
            self._watch.begin_batch()
            self._set_watch(self._watch)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._dispatchers:
            return
        self._batches += 1
        self._set_watch(None)
        for finished in self._watch.drain():
            self._run.add(*finished)
            self._interval.add(*finished)
        if at_log_step(trainer) and self._interval.batches:
            log_metrics(trainer, _metrics(self._interval.means()))
            self._interval = _Totals()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._set_watch(None)

    def run_times(self) -> dict[str, ExchangeTimes]:
        """Means of a timed micro-batch over the run so far, by direction."""
        return self._run.means()

    def _set_watch(self, watch: _Watch | None) -> None:
        for dispatcher in self._dispatchers:
            dispatcher.comm_hook = watch


class _Pass(NamedTuple):
    batch: int
    transfer: Comm
    stamps: dict[CommEvent | str, Stamp]


class _Watch:
    """Stamps every moment of every transfer."""

    def __init__(self) -> None:
        self._batch = 0
        self._open: dict[int, dict[CommEvent | str, Stamp]] = {}
        self._closed: deque[_Pass] = deque()
        self._side: Any = None

    def begin_batch(self) -> None:
        self._batch += 1

    def __call__(self, transfer: Comm, moment: CommEvent) -> None:
        on_gpu = transfer.on_gpu
        stamps = self._open.setdefault(id(transfer), {})
        if moment is CommEvent.WAIT and on_gpu and transfer.work is not None:
            stamps["arrived"] = self._arrival(transfer)
        stamps[moment] = stamp = CudaStamp() if on_gpu else HostStamp()
        stamp.take()
        if moment is CommEvent.END:
            del self._open[id(transfer)]
            self._closed.append(_Pass(self._batch, transfer, stamps))

    def _arrival(self, transfer: Comm) -> CudaStamp:
        """The moment on a stream that waits for the transfer and does nothing else."""
        self._side = self._side or torch.cuda.Stream()
        stamp = CudaStamp()
        with torch.cuda.stream(self._side):
            transfer.work.wait()
            stamp.take()
        return stamp

    def drain(self) -> list[tuple[int, str, ExchangeTimes]]:
        finished = []
        while self._closed and all(stamp.ready() for stamp in self._closed[0].stamps.values()):
            batch, transfer, stamps = self._closed.popleft()
            begin, wait, end = (stamps[moment] for moment in CommEvent)
            arrived: Any = stamps.get("arrived", end)
            exposed_ms = wait.milliseconds_until(end)  # type: ignore[arg-type]
            # The computing stream goes on a little after the arrival: where it waited for all of it, that is the total.
            total_ms = max(begin.milliseconds_until(arrived), exposed_ms)
            times = ExchangeTimes(total_ms, exposed_ms, transfer.bytes_received / 1e6)
            finished.append((batch, transfer.name, times))
        return finished


class _Totals:
    def __init__(self) -> None:
        self.batches: set[int] = set()
        self._sums: dict[str, ExchangeTimes] = {}

    def add(self, batch: int, name: str, times: ExchangeTimes) -> None:
        self.batches.add(batch)
        before = self._sums.get(name, ExchangeTimes(0.0, 0.0, 0.0))
        self._sums[name] = ExchangeTimes(*(a + b for a, b in zip(before, times, strict=True)))

    def means(self) -> dict[str, ExchangeTimes]:
        count = len(self.batches)
        return {name: ExchangeTimes(*(value / count for value in sums)) for name, sums in self._sums.items()}


def _metrics(means: dict[str, ExchangeTimes]) -> dict[str, float]:
    return {
        f"exchange/{name.replace('/', '_')}_{figure}": value
        for name, times in means.items()
        for figure, value in times.figures().items()
    }
