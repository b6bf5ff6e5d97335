"""Times on the device without a wait: CUDA events that are read once they have passed, or `perf_counter` on the CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from typing_extensions import override

from moe_lightning.layers import Phase, Step
from moe_lightning.layers.recompute import in_backward

Direction = Literal["forward", "backward"]


class PhaseTimes(NamedTuple):
    """One pass through one layer: milliseconds of each phase, index and permute together in backward."""

    layer: int
    direction: Direction
    milliseconds: dict[Phase, float]


class HostEvent:
    """A point in time by `time.perf_counter`."""

    in_graph = False

    def record(self) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def reached(self) -> bool:
        """Always."""
        return True

    def milliseconds_until(self, later: HostEvent) -> float:
        """Wall time."""
        return 1e3 * (later.seconds - self.seconds)


class CudaEvent:
    """The point at which the current stream has done all that is queued now.

    Args:
        in_graph: recorded while the stream is captured: the point is that of the graph's latest replay.
    """

    def __init__(self, in_graph: bool = False) -> None:
        self.event = torch.cuda.Event(enable_timing=True, external=in_graph)
        self.in_graph = in_graph

    def record(self) -> None:
        """On the current stream."""
        self.event.record()

    def reached(self) -> bool:
        """Asks the driver; does not wait."""
        return self.event.query()

    def milliseconds_until(self, later: CudaEvent) -> float:
        """GPU time."""
        return self.event.elapsed_time(later.event)


#: Events of one group are of one kind.
Event = HostEvent | CudaEvent
Key = TypeVar("Key")
Name = TypeVar("Name")


class CapturedGroup(NamedTuple):
    """A group of events in a CUDA graph, for `timer.close` after a replay."""

    timer: EventTimer[Any, Any]
    key: Any
    events: dict[Any, Any]


#: The groups of the graph that is being captured; None: none is.
_captured: list[CapturedGroup] | None = None


@contextmanager
def capture_events() -> Iterator[list[CapturedGroup]]:
    """Record events of the graph that is captured meanwhile; yields their groups."""
    global _captured
    groups: list[CapturedGroup] = []
    _captured = groups
    try:
        yield groups
    finally:
        _captured = None


class EventTimer(Generic[Key, Name]):
    """Records events, and gives back those of a group once the device has reached all of them.

    Events are used again: making and dropping them would cost more than recording them. While a step is captured in a
    CUDA graph, they become part of it.
    """

    def __init__(self) -> None:
        self._groups: deque[tuple[Key, dict[Name, Any]]] = deque()
        self._kind: type[Event] = HostEvent
        self._free: list[Event] = []

    def __len__(self) -> int:
        """Groups that were not given back yet."""
        return len(self._groups)

    def record(self, on_gpu: bool | None) -> Event:
        """An event of now, on the GPU's current stream or on the host; None: as the last one."""
        kind = self._kind if on_gpu is None else CudaEvent if on_gpu else HostEvent
        if kind is not self._kind:
            self._kind, self._free = kind, []
        if _captured is not None and kind is CudaEvent:
            event: Event = CudaEvent(in_graph=True)
        else:
            event = self._free.pop() if self._free else kind()
        event.record()
        return event

    def close(self, key: Key, events: dict[Name, Event]) -> None:
        """A group is complete."""
        if _captured is not None:
            _captured.append(CapturedGroup(self, key, events))
        else:
            self._add(key, events)

    def _add(self, key: Key, events: dict[Name, Event]) -> None:
        self._groups.append((key, events))

    def drain(self) -> Iterator[tuple[Key, dict[Name, Any]]]:
        """Groups that the device has passed, oldest first; their events may be read until the next one."""
        while self._groups and all(event.reached() for event in reversed(self._groups[0][1].values())):
            key, events = self._groups.popleft()
            yield key, events
            self._free.extend(e for e in events.values() if isinstance(e, self._kind) and not e.in_graph)


class LayerClock:
    """The `Hook` of one layer: records an event where a phase begins, and again when its gradient arrives."""

    def __init__(self, layer: int, clock: PhaseClock) -> None:
        self.layer = layer
        self.clock = clock
        self._forward: dict[Phase, Event] = {}
        self._backward: dict[Phase, Event] = {}

    @torch.compiler.disable
    def __call__(self, phase: Phase, tensor: Tensor | None = None, _step: Step | None = None) -> None:
        """See `moe_lightning.layers.phases.Hook`."""
        if in_backward():
            return  # a forward pass repeated there, by activation checkpointing, is part of that backward
        if phase is Phase.LOGIT:
            self._forward, self._backward = {}, {}
        self._forward[phase] = self.clock.record(tensor)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(partial(self._gradient_arrived, phase, self._backward))
        if phase is Phase.DONE:
            self.clock.timer.close((self.layer, "forward"), self._forward)

    def _gradient_arrived(self, phase: Phase, events: dict[Phase, Event], gradient: Tensor) -> None:
        events[phase] = self.clock.record(gradient)
        if phase is Phase.LOGIT:
            self.clock.timer.close((self.layer, "backward"), events)


class PhaseClock:
    """Times the passes of all layers, one hook each."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerClock(layer, self) for layer in range(num_layers)]
        self.timer: EventTimer[tuple[int, Direction], Phase] = EventTimer()

    def record(self, tensor: Tensor | None) -> Event:
        """An event on the device of the last tensor seen."""
        return self.timer.record(None if tensor is None else tensor.is_cuda)

    def drain(self) -> list[PhaseTimes]:
        """Times of finished passes, oldest first; leaves those still running on the device."""
        return [
            PhaseTimes(layer, direction, _durations(events, direction))
            for (layer, direction), events in self.timer.drain()
        ]


def _durations(events: dict[Phase, Any], direction: Direction) -> dict[Phase, float]:
    """Forward, a phase ends where the next begins; backward, it begins there."""
    pairs = pairwise(sorted(events))
    if direction == "forward":
        return {phase: events[phase].milliseconds_until(events[after]) for phase, after in pairs}
    return {phase: events[after].milliseconds_until(events[phase]) for phase, after in pairs}


_LAST_PART = "run_training_batch"


class StepTotals(NamedTuple):
    """Micro-batches that the device has finished, and their time."""

    steps: int = 0
    milliseconds: float = 0.0

    def since(self, earlier: StepTotals) -> StepTotals:
        """What came after `earlier`."""
        return StepTotals(self.steps - earlier.steps, self.milliseconds - earlier.milliseconds)


class StepClock(Profiler):
    """Adds up the parts of each micro-batch: fetch, move to the device, forward, backward, optimizer.

    A profiler, because Lightning announces to its profiler what it does.

    Only the parts of a step are timed, so nothing else can be in the sum: validation, checkpoints, exports, the hooks
    of callbacks between two micro-batches, loggers, the time to the first batch. Callbacks in the middle of a step,
    such as a norm of gradients, are part of it.

    On a GPU a part is what the stream spends between two events, recorded where the host begins and ends it. While
    the stream still works on a step, whatever the host does costs the step nothing; once the stream is idle, the wait
    for the next part is not timed. So the sum is right without a wait, and a step counts once the device has passed
    its end.

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
        self._on_gpu = trainer.strategy.root_device.type == "cuda"
        self._depth = 0
        self._timer: EventTimer[None, int] = EventTimer()
        self._step: dict[int, Event] = {}  # begin, end, begin, end, ...
        self._totals = StepTotals()

    @classmethod
    def attach(cls, trainer: L.Trainer) -> StepClock:
        """The trainer's clock, shared by all callbacks; the first call puts it before the run's own profiler."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if not isinstance(profiler, cls):
            profiler = trainer.profiler = cls(trainer)  # type: ignore[attr-defined]
        return profiler

    @classmethod
    def detach(cls, trainer: L.Trainer) -> None:
        """Give the run its own profiler back; the clock can still be read."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, cls):
            trainer.profiler = profiler._run_profiler  # type: ignore[attr-defined]

    def totals(self) -> StepTotals:
        """Of all steps that the device has finished; does not wait for those it has not."""
        for _, step in self._timer.drain():
            spent = sum(step[begin].milliseconds_until(step[begin + 1]) for begin in range(0, len(step), 2))
            self._totals = StepTotals(self._totals.steps + 1, self._totals.milliseconds + spent)
        return self._totals

    @override
    def start(self, action_name: str) -> None:
        self._run_profiler.start(action_name)
        if self._is_part(action_name):
            self._depth += 1
            if self._depth == 1:  # a step may fetch its batch itself
                self._record()

    @override
    def stop(self, action_name: str) -> None:
        if self._is_part(action_name) and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._record()
            if action_name == _LAST_PART:
                self._timer.close(None, self._step)
                self._step = {}
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

    def _record(self) -> None:
        self._step[len(self._step)] = self._timer.record(self._on_gpu)
