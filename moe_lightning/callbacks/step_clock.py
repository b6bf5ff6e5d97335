"""The time of training steps alone: a batch fetched, moved to the device, forward, backward, optimizer."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.profilers import Profiler

from moe_lightning.callbacks.phase_clock import CudaStamp, HostStamp, Stamp

_LAST_PART = "run_training_batch"


class StepTotals(NamedTuple):
    """Micro-batches that the device has finished, and their time."""

    steps: int = 0
    milliseconds: float = 0.0

    def since(self, earlier: StepTotals) -> StepTotals:
        """What came after `earlier`."""
        return StepTotals(self.steps - earlier.steps, self.milliseconds - earlier.milliseconds)


class StepClock(Profiler):
    """Adds up the parts of each micro-batch. A profiler, because Lightning announces to its profiler what it does.

    Only the parts of a step are timed, so nothing else can be in the sum: validation, checkpoints, exports, the hooks
    of callbacks between two micro-batches, loggers, the time to the first batch. Callbacks in the middle of a step,
    such as a norm of gradients, are part of it.

    On a GPU a part is what the stream spends between two events, recorded where the host begins and ends it. While
    the stream still works on a step, whatever the host does costs the step nothing and nothing is taken off;
    once the stream has run dry, the wait for the next part is no part's. So the sum is right without a wait,
    and a step counts once the device has passed its end.

    Args:
        trainer: whose steps are timed.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self._trainer = trainer
        self._run_profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
        self._parts = {
            "[_TrainingEpochLoop].train_dataloader_next",
            f"[Strategy]{type(trainer.strategy).__name__}.batch_to_device",
            _LAST_PART,
        }
        self._kind: type[Stamp] = CudaStamp if trainer.strategy.root_device.type == "cuda" else HostStamp
        self._depth = 0
        self._step: list[Stamp] = []  # begin, end, begin, end, ...
        self._unfinished: deque[list[Stamp]] = deque()
        self._free: list[Stamp] = []
        self._totals = StepTotals()

    @classmethod
    def attach(cls, trainer: L.Trainer) -> StepClock:
        """The trainer's clock, which all who ask share; put before the run's own profiler by the first."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if not isinstance(profiler, cls):
            profiler = trainer.profiler = cls(trainer)  # type: ignore[attr-defined]
        return profiler

    @classmethod
    def detach(cls, trainer: L.Trainer) -> None:
        """Give the run its own profiler back; those who still hold the clock can read it."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, cls):
            trainer.profiler = profiler._run_profiler  # type: ignore[attr-defined]

    def totals(self) -> StepTotals:
        """Of all steps that the device has finished; does not wait for those it has not."""
        while self._unfinished and self._unfinished[0][-1].ready():
            stamps = self._unfinished.popleft()
            parts: Any = zip(stamps[::2], stamps[1::2], strict=True)
            spent = sum(begin.milliseconds_until(end) for begin, end in parts)
            self._totals = StepTotals(self._totals.steps + 1, self._totals.milliseconds + spent)
            self._free.extend(stamps)
        return self._totals

    def start(self, action_name: str) -> None:
        """Of a part: take the time."""
        self._run_profiler.start(action_name)
        if self._is_part(action_name):
            self._depth += 1
            if self._depth == 1:  # a step may fetch its batch itself
                self._stamp()

    def stop(self, action_name: str) -> None:
        """Of a part: take the time; the last one ends the step."""
        if self._is_part(action_name) and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._stamp()
            if action_name == _LAST_PART:
                self._unfinished.append(self._step)
                self._step = []
                self.totals()
        self._run_profiler.stop(action_name)

    def summary(self) -> str:
        """The run's own profiler's."""
        return self._run_profiler.summary()

    def describe(self) -> None:
        """As `summary`."""
        self._run_profiler.describe()

    def teardown(self, stage: str | None) -> None:
        """As `summary`."""
        self._run_profiler.teardown(stage)

    def _is_part(self, action_name: str) -> bool:
        return action_name in self._parts and bool(self._trainer.training)  # validation moves batches too

    def _stamp(self) -> None:
        stamp = self._free.pop() if self._free else self._kind()
        stamp.take()
        self._step.append(stamp)
