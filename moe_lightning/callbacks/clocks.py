"""Times on the device without a wait: CUDA events that are read once they have passed, or `perf_counter` on the CPU."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.base import in_backward
from moe_lightning.layers import Phase, Step

Direction = Literal["forward", "backward"]


class PhaseTimes(NamedTuple):
    """One pass through one layer: milliseconds of each phase, index and permute together in backward."""

    layer: int
    direction: Direction
    milliseconds: dict[Phase, float]


class HostStamp:
    """A moment by `time.perf_counter`."""

    def take(self) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def ready(self) -> bool:
        """The host's now has always been reached."""
        return True

    def milliseconds_until(self, later: HostStamp) -> float:
        """Wall time."""
        return 1e3 * (later.seconds - self.seconds)


class CudaStamp:
    """The moment the current stream gets to an event."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)

    def take(self) -> None:
        """When the stream has done all that is queued now."""
        self.event.record()

    def ready(self) -> bool:
        """Asks the driver; does not wait."""
        return self.event.query()

    def milliseconds_until(self, later: CudaStamp) -> float:
        """GPU time."""
        return self.event.elapsed_time(later.event)


#: All stamps of a pass are of one kind.
Stamp = HostStamp | CudaStamp


class LayerClock:
    """The `Hook` of one layer: stamps each boundary on the way forward, and again when its gradient arrives."""

    def __init__(self, layer: int, clock: PhaseClock) -> None:
        self.layer = layer
        self.clock = clock
        self._forward: dict[Phase, Stamp] = {}
        self._backward: dict[Phase, Stamp] = {}

    @torch.compiler.disable
    def __call__(self, phase: Phase, tensor: Tensor | None = None, _step: Step | None = None) -> None:
        """See `moe_lightning.layers.phases.Hook`."""
        if in_backward():
            return  # a forward pass repeated there, by activation checkpointing, is part of that backward
        if phase is Phase.LOGIT:
            self._forward, self._backward = {}, {}
        self._forward[phase] = self.clock.stamp(tensor)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(partial(self._gradient_arrived, phase, self._backward))
        if phase is Phase.DONE:
            self.clock.passes.append((self.layer, "forward", self._forward))

    def _gradient_arrived(self, phase: Phase, stamps: dict[Phase, Stamp], gradient: Tensor) -> None:
        stamps[phase] = self.clock.stamp(gradient)
        if phase is Phase.LOGIT:
            self.clock.passes.append((self.layer, "backward", stamps))


class PhaseClock:
    """Collects the passes of all layers; `drain` hands out those whose last point in time has been reached."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerClock(layer, self) for layer in range(num_layers)]
        self.passes: deque[tuple[int, Direction, dict[Phase, Stamp]]] = deque()
        self._kind: type[Stamp] = HostStamp
        self._free: list[Stamp] = []  # making and dropping events would cost more than recording them

    def stamp(self, tensor: Tensor | None) -> Stamp:
        """A moment on the device of the last tensor seen."""
        if tensor is not None and (tensor.is_cuda != (self._kind is CudaStamp)):
            self._kind, self._free = CudaStamp if tensor.is_cuda else HostStamp, []
        stamp = self._free.pop() if self._free else self._kind()
        stamp.take()
        return stamp

    def drain(self) -> list[PhaseTimes]:
        """Times of finished passes, oldest first; leaves those still running on the device."""
        finished = []
        while self.passes:
            layer, direction, stamps = self.passes[0]
            last = Phase.DONE if direction == "forward" else Phase.LOGIT
            if not stamps[last].ready():
                break
            self.passes.popleft()
            finished.append(PhaseTimes(layer, direction, _durations(stamps, direction)))
            self._free.extend(stamps.values())
        return finished


def _durations(stamps: dict[Phase, Any], direction: Direction) -> dict[Phase, float]:
    """Forward, a phase ends where the next begins; backward, it begins there."""
    phases = sorted(stamps)
    pairs = list(pairwise(phases))
    if direction == "forward":
        return {phase: stamps[phase].milliseconds_until(stamps[after]) for phase, after in pairs}
    return {phase: stamps[after].milliseconds_until(stamps[phase]) for phase, after in pairs}


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

    @override
    def start(self, action_name: str) -> None:
        self._run_profiler.start(action_name)
        if self._is_part(action_name):
            self._depth += 1
            if self._depth == 1:  # a step may fetch its batch itself
                self._stamp()

    @override
    def stop(self, action_name: str) -> None:
        if self._is_part(action_name) and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._stamp()
            if action_name == _LAST_PART:
                self._unfinished.append(self._step)
                self._step = []
                self.totals()
        self._run_profiler.stop(action_name)

    @override
    def summary(self) -> str:
        return self._run_profiler.summary()

    @override
    def describe(self) -> None:
        self._run_profiler.describe()

    @override
    def teardown(self, stage: str | None) -> None:
        self._run_profiler.teardown(stage)

    def _is_part(self, action_name: str) -> bool:
        return action_name in self._parts and bool(self._trainer.training)  # validation moves batches too

    def _stamp(self) -> None:
        stamp = self._free.pop() if self._free else self._kind()
        stamp.take()
        self._step.append(stamp)
