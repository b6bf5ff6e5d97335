"""Clocks for the phases of MoE layers: CUDA events that never wait, or `perf_counter` on the CPU."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe_lightning.callbacks.stage import in_backward
from moe_lightning.layers import Phase

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
    """The `Mark` of one layer: stamps each boundary on the way forward, and again when its gradient arrives."""

    def __init__(self, layer: int, clock: PhaseClock) -> None:
        self.layer = layer
        self.clock = clock
        self._forward: dict[Phase, Stamp] = {}
        self._backward: dict[Phase, Stamp] = {}

    @torch.compiler.disable
    def __call__(self, phase: Phase, tensor: Tensor | None = None) -> None:
        """See `moe_lightning.layers.phases.Mark`."""
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
    """Forward, a phase ends at the next mark; backward, it begins there."""
    phases = sorted(stamps)
    pairs = list(pairwise(phases))
    if direction == "forward":
        return {phase: stamps[phase].milliseconds_until(stamps[after]) for phase, after in pairs}
    return {phase: stamps[after].milliseconds_until(stamps[phase]) for phase, after in pairs}
