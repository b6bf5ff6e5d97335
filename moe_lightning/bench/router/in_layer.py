"""The phases of a layer as they run within it, by the hook and the clock of the training callback.

A phase timed alone finds its inputs where its last repetition left them (eager, graph) or in no cache (cold). Within
the layer it finds what the phase before it left: that time is compared with its times alone, and the sum of all phases
with the same layer without a hook.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.progress import Progress

from moe_lightning.bench.calls import differentiable
from moe_lightning.bench.gpu_timers import HELD_CYCLES
from moe_lightning.bench.router.case import Case
from moe_lightning.bench.spread import Spread, sum_of_parts, total
from moe_lightning.bench.timers import orders
from moe_lightning.callbacks.clocks import CudaEvent, HostEvent, PhaseClock
from moe_lightning.callbacks.router_timing import RouteTimeTotals
from moe_lightning.layers.phases import no_hook

#: A time in the layer further than this from the times alone is reported.
AGREES = 0.15
ALONE = ("eager_us", "graph_us", "cold_us")
SUMMED = ("T_route", "T_experts", "T_unpack")  # the whole layer
ROUND_SECONDS = 0.02  # of the passes of one layer in a round, on a CPU
MOST_PASSES = 50

#: Microseconds by direction and name; `layer` is without a hook.
InLayer = dict[str, dict[str, Spread]]


def measure_in_layer(cases: dict[str, Case], rounds: int, backward: bool, progress: Progress) -> dict[str, InLayer]:
    """Passes of each layer that has experts, with the callback's clock and without, interleaved."""
    layers = {name: _TimedLayer(case, backward) for name, case in cases.items() if case.without_layer is None}
    task = progress.add_task("in the layer", total=rounds)
    for order in orders(layers, rounds):
        for name in order:
            layers[name].run_round()
        progress.advance(task)
    progress.remove_task(task)
    return {name: layer.spreads() for name, layer in layers.items()}


def add_in_layer(result: dict[str, Any], times: dict[str, Spread]) -> None:
    """Adds `in_layer_us` to the rows of one direction, and `in_layer`: the sum of the phases against the layer, and
    `outside`, the names of phases and sums whose time is not within `AGREES` of those alone.
    """
    rows = result["parts"]
    for name, us in times.items():
        rows[name] |= {"in_layer_us": us.median, "spread": rows[name]["spread"] | {"in_layer_us": us}}
    outside = {name: gap for name in times if (gap := gap_to_alone(rows[name])) is not None and gap > AGREES}
    phases = total(times[name] for name in SUMMED)
    result["in_layer"] = sum_of_parts(phases, times["layer"]) | {"outside": outside}


def gap_to_alone(row: dict[str, Any]) -> float | None:
    """How far the time in the layer is beyond the range of the times alone, over the nearer end; 0 within it.

    None where one of them is too noisy.
    """
    spreads = [row["spread"][column] for column in (*ALONE, "in_layer_us") if column in row["spread"]]
    if any(spread.doubt for spread in spreads):
        return None
    us, alone = row["in_layer_us"], [row[column] for column in ALONE if row[column] is not None]
    return max(min(alone) / us - 1, us / max(alone) - 1, 0.0) if us and max(alone) else 0.0


class _TimedLayer:
    """One layer, and the samples of its times."""

    def __init__(self, case: Case, backward: bool) -> None:
        self._moe, self._x_TD, self._backward = case.moe, case.x_TD, backward
        self._grad_TD = torch.randn_like(case.x_TD)
        self._clock = PhaseClock(1)
        self._samples: dict[str, dict[str, list[float]]] = {}
        self._held_cycles = 0
        self._run()
        began = time.perf_counter()
        self._run()
        seconds = time.perf_counter() - began
        self._passes = 1 if case.x_TD.is_cuda else max(1, min(MOST_PASSES, int(ROUND_SECONDS / seconds)))
        # The GPU is held until a pass is queued: the host may take longer for it than the GPU does.
        self._held_cycles = int(HELD_CYCLES * seconds)

    def run_round(self) -> None:
        """A sample of each time: the mean over some passes."""
        whole_ms: dict[str, float] = {}
        totals = RouteTimeTotals()
        for _ in range(self._passes):
            for direction, ms in self._run().items():
                whole_ms[direction] = whole_ms.get(direction, 0.0) + ms / self._passes
            self._moe.hook = self._clock.layers[0]
            try:
                self._run()
            finally:
                self._moe.hook = no_hook
            for times in self._clock.drain():
                totals.add(times)
        for (_, direction), phases_ms in totals.by_layer().items():
            samples = self._samples.setdefault(direction, {})
            for name, ms in (phases_ms | {"layer": whole_ms[direction]}).items():
                samples.setdefault(name, []).append(1e3 * ms)

    def spreads(self) -> InLayer:
        """Of all rounds."""
        return {
            direction: {name: Spread.of(values) for name, values in samples.items()}
            for direction, samples in self._samples.items()
        }

    def _run(self) -> dict[str, float]:
        """Milliseconds of one pass, by direction; forward records for autograd either way."""
        on_gpu = self._x_TD.is_cuda
        if on_gpu:
            torch.cuda.synchronize(self._x_TD.device)
            torch.cuda._sleep(self._held_cycles)
        events: list[Any] = [CudaEvent() if on_gpu else HostEvent() for _ in range(3)]
        events[0].record()
        y_TD = self._moe(self._x_TD)[0]
        events[1].record()
        if self._backward:
            leaves = self._x_TD, *differentiable(self._moe)
            torch.autograd.grad(y_TD, leaves, self._grad_TD, allow_unused=True)
            events[2].record()
        if on_gpu:
            torch.cuda.synchronize(self._x_TD.device)
        times = {"forward": events[0].milliseconds_until(events[1])}
        return times | ({"backward": events[1].milliseconds_until(events[2])} if self._backward else {})
