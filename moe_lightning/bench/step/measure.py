"""Time and memory of a step in a form, by itself or taking turns with others, and the time of its parts.

Time by part comes from events around the parts, which are part of the graph where there is one. On a GPU the step is
queued while the device is held, so that the parts have no gaps of the host in them; what the host adds is the time of
steps as they are trained, less that of the same kernels without gaps.
"""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.bench.gpu_timers import HELD_CYCLES
from moe_lightning.bench.spread import Spread
from moe_lightning.bench.step.models import StepModel, Variant
from moe_lightning.bench.timers import orders
from moe_lightning.callbacks.base import moe_layers
from moe_lightning.callbacks.clocks import CudaEvent, EventTimer, HostEvent, PhaseClock
from moe_lightning.layers import FeedForward, MoE, Phase
from moe_lightning.layers.phases import with_hook, without_hook
from moe_lightning.layers.recompute import in_backward
from moe_lightning.models import Decoder
from moe_lightning.training.graphed_step import WARM_UP
from moe_lightning.training.optimizer_step import OptimizerStep

#: One round of one variant.
ROUND_SECONDS = 0.3
#: Of the GPU's memory, that all variants together may take.
MOST_MEMORY = 0.9

FEED_FORWARD, HEAD, REST, OPTIMIZER = "feed-forward", "head and loss", "rest", "optimizer"
_PHASE_PARTS = {
    "T_logit": (Phase.LOGIT,),
    "T_select": (Phase.SELECT,),
    "T_pack": (Phase.INDEX, Phase.PERMUTE),
    "T_experts": (Phase.EXPERTS,),
    "T_unpack": (Phase.UNPACK,),
}
#: Of a step, in the order of tables; a dense model has the feed-forward network in place of the phases.
PARTS = (*_PHASE_PARTS, FEED_FORWARD, REST, HEAD, OPTIMIZER)


@dataclass(frozen=True)
class Alone:
    """What a variant takes by itself."""

    seconds: float
    """Of a step, roughly."""
    peak: int | None = None
    """The most bytes at once: weights, moments, gradients and activations; None on a CPU."""
    kept: int | None = None
    """Bytes that the forward pass of a micro-batch leaves for backward."""
    held: int = 0
    """Bytes that stay taken between its steps, those of the model apart."""
    passing: int = 0
    """Bytes above these while it runs."""
    never: str | None = None
    """Why there is no graph."""


@dataclass(frozen=True)
class PartTimes:
    """Milliseconds of an optimizer step."""

    parts: dict[str, Spread]
    whole: Spread
    """Of the same step without clocks in it."""
    without_gaps: bool
    """Whether all was queued while the device was held; else what the host adds is in the parts."""


class Batches:
    """Micro-batches of the next optimizer step, again and again."""

    def __init__(self, batches: Sequence[Tensor], accumulate: int) -> None:
        self._batches, self._accumulate = cycle(batches), accumulate

    def next(self) -> list[Tensor]:
        """As many as a gradient has."""
        return [next(self._batches) for _ in range(self._accumulate)]


def measure_alone(model: StepModel, variant: Variant, batches: Batches, device: torch.device, outside: int) -> Alone:
    """Warm up, then time and weigh a variant; `outside` bytes are not of this model."""
    on_gpu = device.type == "cuda"
    state, reserved = _settle(device)
    step = model.step(variant)
    step(batches.next())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)  # what compiling takes is not the step's
    _warm_up(step, batches)
    graphs = step.micro_batches.graphs
    if graphs is not None and graphs.never is not None:
        step.close()
        return Alone(0.0, never=graphs.never)
    seconds = _seconds_per_step(step, batches, 2, device)
    if not on_gpu:
        step.close()
        return Alone(seconds)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device) - reserved
    step.close()
    kept = _kept(model, variant, batches, device)
    return Alone(seconds, peak - outside, kept, held, max(0, peak - state - held))


def _kept(model: StepModel, variant: Variant, batches: Batches, device: torch.device) -> int:
    step = model.step(variant.with_graph(False))
    batch = batches.next()[0]
    step.forward(batch, True)
    before = torch.cuda.memory_allocated(device)
    losses = step.forward(batch, True)
    kept = torch.cuda.memory_allocated(device) - before
    del losses
    return kept


def _settle(device: torch.device) -> tuple[int, int]:
    """Bytes allocated and reserved, all else given back."""
    if device.type != "cuda":
        return 0, 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def fit_together(alone: Mapping[Variant, Alone], device: torch.device) -> bool:
    """Whether all variants can stay in the device's memory at once, graphs and gradients of each."""
    if device.type != "cuda":
        return True
    _, reserved = _settle(device)
    needed = reserved + sum(one.held for one in alone.values()) + max(one.passing for one in alone.values())
    return needed <= MOST_MEMORY * torch.cuda.mem_get_info(device)[1]


def measure_rounds(
    models: Mapping[Variant, StepModel],
    alone: Mapping[Variant, Alone],
    batches: Batches,
    rounds: int,
    device: torch.device,
    together: bool,
    advance: Callable[[], Any],
) -> dict[Variant, list[float]]:
    """Seconds per optimizer step of each variant in each round; they take turns, in a new random order each round.

    Where they do not fit `together`, each is built for its turn and freed after it.
    """
    names = {str(variant): variant for variant in models}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in models}
    steps = {variant: _warm(model, variant, batches) for variant, model in models.items()} if together else {}
    for order in orders(names, rounds):
        for variant in map(names.__getitem__, order):
            step = steps[variant] if together else _warm(models[variant], variant, batches)
            count = max(1, round(ROUND_SECONDS / alone[variant].seconds))
            seconds[variant].append(_seconds_per_step(step, batches, count, device))
            if not together:
                step.close()
                del step
                _settle(device)
            advance()
    for step in steps.values():
        step.close()
    return seconds


def _warm(model: StepModel, variant: Variant, batches: Batches) -> OptimizerStep:
    step = model.step(variant)
    _warm_up(step, batches)
    return step


def _warm_up(step: OptimizerStep, batches: Batches) -> None:
    """Those that begin eagerly, then one in which all graphs are captured."""
    for _ in range(math.ceil(WARM_UP / step.accumulate) + 1):
        step(batches.next())


def _seconds_per_step(step: OptimizerStep, batches: Batches, count: int, device: torch.device) -> float:
    """After one that is not timed: the first after another variant finds other things in the caches."""
    step(batches.next())
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        step(batches.next())
    _synchronize(device)
    return (time.perf_counter() - began) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- parts ---------------------------------------------------------------------------------------------------


class PartClock:
    """Events around the parts of each micro-batch of a module, while it is `attached`; they may be part of graphs."""

    def __init__(self, module: nn.Module, network: Decoder) -> None:
        self._layers, self._network = moe_layers(module), network
        self._phases = PhaseClock(len(self._layers))
        self._spans: EventTimer[str, int] = EventTimer()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Meanwhile."""
        with ExitStack() as stack:
            stack.callback(self._network.norm.register_forward_hook(self._hidden_states_done).remove)
            for layer, clock in zip(self._layers, self._phases.layers, strict=True):
                layer.hook = with_hook(layer.hook, clock)
                stack.callback(_take_off, layer, clock)
            for block in self._network.blocks:
                feed_forward = block.feed_forward
                if isinstance(feed_forward, FeedForward):
                    stack.callback(setattr, block, "feed_forward", feed_forward)
                    block.feed_forward = _Timed(feed_forward, self._spans)
            yield

    def drain(self) -> dict[str, float]:
        """Milliseconds of each part, of all micro-batches that the device has finished since the last time."""
        spent: dict[str, float] = defaultdict(float)
        for times in self._phases.drain():
            for name, phases in _PHASE_PARTS.items():
                spent[name] += sum(times.milliseconds.get(phase, 0.0) for phase in phases)
        for name, events in self._spans.drain():
            spent[name] += events[0].milliseconds_until(events[1])
        return dict(spent)

    def _hidden_states_done(self, _: nn.Module, __: Any, hidden_BSD: Tensor) -> None:
        """What follows is head and loss, until the gradient is back here."""
        _span(self._spans, HEAD, hidden_BSD)


def _take_off(layer: MoE, clock: Any) -> None:
    layer.hook = without_hook(layer.hook, clock)


def _span(timer: EventTimer[str, int], name: str, later: Tensor, earlier: Tensor | None = None) -> None:
    """From now, or from when `earlier` has its gradient, until `later` has."""
    events: dict[int, Any] = {}

    def begin(gradient: Tensor) -> None:
        events[0] = timer.record(gradient.is_cuda)

    def end(gradient: Tensor) -> None:
        events[1] = timer.record(gradient.is_cuda)
        timer.close(name, events)

    if earlier is None:
        begin(later)
    else:
        earlier.register_hook(begin)
    later.register_hook(end)


class _Timed(nn.Module):
    """A feed-forward network between events, forward and backward."""

    def __init__(self, inner: nn.Module, timer: EventTimer[str, int]) -> None:
        super().__init__()
        self.inner, self._timer = inner, timer

    @override
    def forward(self, x: Tensor, tokens: Any = None) -> tuple[Tensor, None]:
        if in_backward():
            return self.inner(x)  # a repeated pass is part of that backward
        begin = self._timer.record(x.is_cuda)
        y, routing = self.inner(x)
        self._timer.close(FEED_FORWARD, {0: begin, 1: self._timer.record(y.is_cuda)})
        _span(self._timer, FEED_FORWARD, x, y)
        return y, routing


def measure_parts(
    model: StepModel, variant: Variant, batches: Batches, rounds: int, device: torch.device, seconds: float
) -> PartTimes:
    """Of the kernels of a variant, with events around the parts and without.

    On a GPU in graphs where they can be captured, whatever the variant's form: those have the same kernels. `seconds`:
    of a step, roughly.
    """
    module = model.module(variant)
    assert isinstance(module.network, Decoder)
    clock = PartClock(module, module.network)
    _settle(device)
    graphed = device.type == "cuda"
    step = _warm(model, variant.with_graph(graphed), batches)
    if graphed and step.micro_batches.graphs is not None and step.micro_batches.graphs.never is not None:
        graphed = False
        step.close()
        step = _warm(model, variant.with_graph(False), batches)
    hold = seconds if graphed else 0.0
    wholes: list[float] = []
    samples: dict[str, list[float]] = defaultdict(list)

    def time_whole(step: OptimizerStep) -> None:
        wholes.append(sum(_held(step, batches, device, hold)))

    def time_parts(step: OptimizerStep) -> None:
        gradient, update = _held(step, batches, device, hold)
        spent = clock.drain()
        for name, milliseconds in spent.items():
            samples[name].append(milliseconds)
        samples[REST].append(gradient - sum(spent.values()))
        samples[OPTIMIZER].append(update)

    if not graphed:  # both by one step, in turn, so that both see the same machine
        for _ in range(rounds):
            time_whole(step)
            with clock.attached():
                time_parts(step)
    else:  # events are part of a graph, and two graphs may not fit in memory
        for _ in range(rounds):
            time_whole(step)
        step.close()
        del step
        _settle(device)
        with clock.attached():
            step = _warm(model, variant.with_graph(True), batches)
            _synchronize(device)
            clock.drain()  # of warming up
            for _ in range(rounds):
                time_parts(step)
    step.close()
    return PartTimes({name: Spread.of(samples[name]) for name in PARTS if name in samples}, Spread.of(wholes), graphed)


def _held(step: OptimizerStep, batches: Batches, device: torch.device, seconds: float) -> tuple[float, float]:
    """Milliseconds of gradient and of clipping and update, queued while a GPU is held for at least so long."""
    kind: type[Any] = CudaEvent if device.type == "cuda" else HostEvent
    events = [kind() for _ in range(3)]
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda._sleep(int(HELD_CYCLES * seconds))
    events[0].record()
    step.gradient(batches.next())
    events[1].record()
    step.update()
    events[2].record()
    _synchronize(device)
    return events[0].milliseconds_until(events[1]), events[1].milliseconds_until(events[2])
