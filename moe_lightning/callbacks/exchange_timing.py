"""T_comm, the exchanges between ranks, while training: their total, and what no other work overlapped."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
import torch
from typing_extensions import override

from moe_lightning.callbacks.base import MicroBatchTiming, at_log_step, log_metrics, moe_layers
from moe_lightning.callbacks.clocks import Event, EventTimer
from moe_lightning.expert_parallel.collectives import Comm, CommEvent, HasCommHook
from moe_lightning.utils.checks import check_sizes


class ExchangeTimes(NamedTuple):
    """Of one direction (dispatch or combine, forward or backward), means of a timed micro-batch over all layers."""

    total_ms: float
    """From the start of a transfer to its end; on a CPU with the work that overlaps it."""
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


class ExchangeTiming(MicroBatchTiming):
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
        self._timer = _CommTimer()
        self._run, self._interval = _Totals(), _Totals()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dispatchers = [layer.dispatcher for layer in moe_layers(pl_module)]
        self._dispatchers = [d for d in dispatchers if isinstance(d, HasCommHook)] if self.enabled else []
        self._batches, self._timer = 0, _CommTimer()
        self._run, self._interval = _Totals(), _Totals()

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._timer.events.batch = self._batches
        self._set_attached(self._batches % self.every_n_batches == min(1, self.every_n_batches - 1))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self._dispatchers:
            return
        self._batches += 1
        self._set_attached(False)
        for finished in self._timer.drain():
            self._run.add(*finished)
            self._interval.add(*finished)
        if at_log_step(trainer) and self._interval.batches:
            log_metrics(trainer, _metrics(self._interval.means()))
            self._interval = _Totals()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._set_attached(False)

    @property
    @override
    def is_idle(self) -> bool:
        return not len(self._timer.events)

    def run_times(self) -> dict[str, ExchangeTimes]:
        """Means of a timed micro-batch over the run so far, by direction."""
        return self._run.means()

    @override
    def _set_attached(self, on: bool) -> None:
        self._attached = on and bool(self._dispatchers)
        for dispatcher in self._dispatchers:
            dispatcher.comm_hook = self._timer if on else None


class _Events(EventTimer[Any, CommEvent | str]):
    """Groups by the number of their micro-batch; those of a CUDA graph by that of each replay."""

    batch = 0

    @override
    def _add(self, key: Any, events: dict[CommEvent | str, Event]) -> None:
        super()._add((self.batch, key), events)


class _CommTimer:
    """The `CommHook` of all dispatchers: records every event of every movement."""

    def __init__(self) -> None:
        self.events = _Events()
        self._open: dict[int, dict[CommEvent | str, Event]] = {}
        self._side: Any = None

    def __call__(self, comm: Comm, event: CommEvent) -> None:
        events = self._open.setdefault(id(comm), {})
        if event is CommEvent.WAIT and comm.on_gpu and comm.work is not None:
            events["arrived"] = self._arrival(comm)
        events[event] = self.events.record(comm.on_gpu)
        if event is CommEvent.END:
            self.events.close(comm, self._open.pop(id(comm)))

    def _arrival(self, comm: Comm) -> Event:
        """Recorded on a stream that does nothing but wait for the rows."""
        self._side = self._side or torch.cuda.Stream()
        with torch.cuda.stream(self._side):
            comm.work.wait()
            return self.events.record(on_gpu=True)

    def drain(self) -> list[tuple[int, str, ExchangeTimes]]:
        finished = []
        for (batch, comm), events in self.events.drain():
            start, wait, end = (events[event] for event in CommEvent)
            exposed_ms = wait.milliseconds_until(end)
            # The computing stream goes on a little after the arrival: where it waited for all of it, that is the total.
            total_ms = max(start.milliseconds_until(events.get("arrived", end)), exposed_ms)
            finished.append((batch, comm.name, ExchangeTimes(total_ms, exposed_ms, comm.bytes_received / 1e6)))
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
