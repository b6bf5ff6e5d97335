"""T_logit, T_select, T_pack, T_route of every MoE layer, forward and backward, while training."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
from typing_extensions import override

from moe_lightning.callbacks.base import MicroBatchTiming, at_log_step, log_metrics, moe_layers
from moe_lightning.callbacks.clocks import Direction, PhaseClock, PhaseTimes, StepClock
from moe_lightning.layers import MoE, Phase, with_hook, without_hook
from moe_lightning.layers.phases import FORWARD_ONLY, TIMES
from moe_lightning.utils.checks import check_not_negative, check_sizes


class RouteTimes(NamedTuple):
    """Milliseconds of one micro-batch: all layers together, by name, and its whole step."""

    forward: dict[str, float]
    backward: dict[str, float]
    """Without T_index and T_permute."""
    step_milliseconds: float

    @property
    def milliseconds(self) -> dict[str, float]:
        """Forward and backward together; of T_index and T_permute the forward pass alone."""
        return {name: value + self.backward.get(name, 0.0) for name, value in self.forward.items()}

    @property
    def route_share(self) -> float:
        """T_route, forward and backward, over the whole step."""
        return self.milliseconds["T_route"] / self.step_milliseconds


class RouteTimeTotals:
    """Adds passes up by layer, direction and phase."""

    def __init__(self) -> None:
        self._milliseconds: dict[tuple[int, Direction, Phase], float] = {}
        self._passes: dict[tuple[int, Direction], int] = {}

    def __bool__(self) -> bool:
        return bool(self._passes)

    def add(self, times: PhaseTimes) -> None:
        """Count one pass through one layer."""
        layer, direction = times.layer, times.direction
        self._passes[layer, direction] = self._passes.get((layer, direction), 0) + 1
        for phase, value in times.milliseconds.items():
            key = (layer, direction, phase)
            self._milliseconds[key] = self._milliseconds.get(key, 0.0) + value

    def of_layer(self, layer: int, direction: Direction) -> dict[str, float]:
        """Mean milliseconds of a pass through a layer, by name; backward has no T_index and T_permute."""
        passes = self._passes[layer, direction]
        return {
            name: sum(self._milliseconds.get((layer, direction, phase), 0.0) for phase in phases) / passes
            for name, phases in TIMES.items()
            if direction == "forward" or name not in FORWARD_ONLY
        }

    def by_layer(self) -> dict[tuple[int, Direction], dict[str, float]]:
        """`of_layer` for every layer and direction seen."""
        return {key: self.of_layer(*key) for key in self._passes}

    def of_step(self, direction: Direction) -> dict[str, float]:
        """Mean milliseconds of a micro-batch, summed over layers, by name; empty where no pass was timed."""
        parts = [self.of_layer(*key) for key in self._passes if key[1] == direction]
        return {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}


class RouterTiming(MicroBatchTiming):
    """Logs router_time/forward/* and /backward/* (all layers together) and router_time_layer/* (each by itself).

    A micro-batch in `every_n_batches` is timed; between them the layers have no hook. On a GPU the times are CUDA
    events, read only once the GPU has passed them, so the callback never waits; on the CPU they are wall time. The
    first timed micro-batch warms up and counts only in a run that ends before the second. router_time/step_ms is
    the mean of all micro-batches, by a `StepClock`. Validation has its own totals, of forward alone; the sanity check
    is not counted. Each rank times itself, and rank zero's times are logged. Backward has no T_index and T_permute,
    only their sum, T_pack. A forward pass that is repeated in backward (activation checkpointing) counts as backward.

    Args:
        enabled: off leaves the layers untouched and costs nothing.
        every_n_batches: how often a micro-batch is timed.
        layers_every_n_steps: optimizer steps between two logs of every layer by itself; 0: never.
    """

    def __init__(self, enabled: bool = True, every_n_batches: int = 10, layers_every_n_steps: int = 100) -> None:
        check_sizes("router_timing", every_n_batches=every_n_batches)
        check_not_negative("router_timing", "layers_every_n_steps", layers_every_n_steps)
        self.enabled = enabled
        self.every_n_batches = every_n_batches
        self.layers_every_n_steps = layers_every_n_steps
        self._layers: list[MoE] = []
        self._clock: PhaseClock | None = None
        self._train_clock: PhaseClock | None = None
        self._step_clock: StepClock | None = None
        self._run: _Window | None = None
        self._interval: _Window | None = None
        self._evaluation = RouteTimeTotals()
        self._batches = self._layers_logged = 0

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the clocks, now that `configure_model` has made all layers."""
        self._make_clocks(pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._set_attached(False)
        StepClock.detach(trainer)
        self._clock = self._train_clock = None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches = self._layers_logged = 0
        self._run = self._interval = None
        if self._clock is not None:
            self._step_clock = StepClock.attach(trainer)
            self._open_windows()

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        if self._clock is None or self._batches % self.every_n_batches:
            return
        if self._batches == self.every_n_batches:
            self._clock.drain()
            self._open_windows()
        self._set_attached(True)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._clock is None or self._run is None or self._interval is None:
            return
        self._set_attached(False)
        self._batches += 1
        for times in self._clock.drain():
            self._run.totals.add(times)
            self._interval.totals.add(times)
        if at_log_step(trainer) and self._batches > self.every_n_batches and (means := self._interval.times()):
            self._log(trainer, means, self._interval.totals)
            self._interval = _Window(self._interval.clock, self._interval.passes)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Passes of training that are still on the device wait for its end in training's own clock."""
        self._evaluation = RouteTimeTotals()
        self._train_clock = self._clock
        self._make_clocks(pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking and batch_idx % self.every_n_batches == min(1, self.every_n_batches - 1):
            self._set_attached(True)

    @override
    def on_validation_batch_end(self, *_: Any) -> None:
        if self._clock is None:
            return
        self._set_attached(False)
        for times in self._clock.drain():
            self._evaluation.add(times)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluation:
            means = self._evaluation.of_step("forward")
            log_metrics(trainer, {f"router_time_val/{name}_ms": value for name, value in means.items()})
        self._set_attached(False)
        self._clock, self._train_clock = self._train_clock, None

    @property
    @override
    def is_idle(self) -> bool:
        return self._clock is None or not len(self._clock.timer)

    def run_times(self) -> RouteTimes | None:
        """Means over the training run so far; None before the first timed micro-batch has finished, or when off."""
        return None if self._run is None else self._run.times()

    def _log(self, trainer: L.Trainer, means: RouteTimes, totals: RouteTimeTotals) -> None:
        metrics = {
            f"router_time/{direction}/{name}_ms": value
            for direction, times in (("forward", means.forward), ("backward", means.backward))
            for name, value in times.items()
        }
        metrics["router_time/step_ms"] = means.step_milliseconds
        metrics["router_time/T_route_share"] = means.route_share
        step = trainer.global_step
        due = self.layers_every_n_steps and step - self._layers_logged >= self.layers_every_n_steps
        if due or (self.layers_every_n_steps and not self._layers_logged):
            self._layers_logged = step
            for (layer, direction), of_layer in totals.by_layer().items():
                for name, value in of_layer.items():
                    metrics[f"router_time_layer/L{layer}/{direction}/{name}_ms"] = value
        log_metrics(trainer, metrics)

    def _make_clocks(self, pl_module: L.LightningModule) -> None:
        self._set_attached(False)
        self._layers = moe_layers(pl_module)
        self._clock = PhaseClock(len(self._layers)) if self.enabled and self._layers else None

    def _open_windows(self) -> None:
        assert self._step_clock is not None
        assert self._clock is not None
        self._run, self._interval = _Window(self._step_clock, self._clock), _Window(self._step_clock, self._clock)

    @override
    def _set_attached(self, on: bool) -> None:
        self._attached = on and self._clock is not None
        if self._clock is not None:
            change = with_hook if on else without_hook
            for layer, clock in zip(self._layers, self._clock.layers, strict=True):
                layer.hook = change(layer.hook, clock)


class _Window:
    """Timed passes, and the steps of a clock, since now."""

    def __init__(self, clock: StepClock, passes: PhaseClock) -> None:
        self.totals = RouteTimeTotals()
        self.clock, self.passes = clock, passes
        self._since = clock.totals()

    def times(self) -> RouteTimes | None:
        """None before the device has finished a step and a timed pass, backward too where there is one."""
        steps = self.clock.totals().since(self._since)
        forward, backward = self.totals.of_step("forward"), self.totals.of_step("backward")
        if not (forward and steps.steps and (backward or not len(self.passes.timer))):
            return None
        return RouteTimes(forward, backward, steps.milliseconds / steps.steps)
