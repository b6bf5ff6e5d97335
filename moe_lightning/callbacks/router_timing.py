"""T_logit, T_select, T_pack, T_route of every MoE layer, forward and backward, while training."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning as L

from moe_lightning.callbacks.phase_clock import PhaseClock, PhaseTimes
from moe_lightning.callbacks.stage import at_log_step, log_metrics, moe_layers
from moe_lightning.layers import Phase, no_mark

#: Names of DESIGN: T_pack = T_index + T_permute, T_route = T_logit + T_select + T_pack.
NAMED_TIMES: dict[str, tuple[Phase, ...]] = {
    "T_logit": (Phase.LOGIT,),
    "T_select": (Phase.SELECT,),
    "T_index": (Phase.INDEX,),
    "T_permute": (Phase.PERMUTE,),
    "T_pack": (Phase.INDEX, Phase.PERMUTE),
    "T_route": (Phase.LOGIT, Phase.SELECT, Phase.INDEX, Phase.PERMUTE),
    "T_experts": (Phase.EXPERTS,),
    "T_combine": (Phase.UNPERMUTE,),
}


class RouteTimes(NamedTuple):
    """Means since a point in time: milliseconds of one micro-batch, summed over layers and directions."""

    milliseconds: dict[str, float]
    step_milliseconds: float

    @property
    def route_share(self) -> float:
        """T_route over the whole step."""
        return self.milliseconds["T_route"] / self.step_milliseconds


class _Totals:
    """Milliseconds by (layer, direction, phase), and how many passes they cover."""

    def __init__(self) -> None:
        self.milliseconds: dict[tuple[int, str, Phase], float] = {}
        self.passes: dict[tuple[int, str], int] = {}

    def add(self, times: PhaseTimes) -> None:
        key = (times.layer, times.direction)
        self.passes[key] = self.passes.get(key, 0) + 1
        for phase, value in times.milliseconds.items():
            self.milliseconds[*key, phase] = self.milliseconds.get((*key, phase), 0.0) + value

    def mean(self, layer: int, direction: str, name: str) -> float:
        total = sum(self.milliseconds.get((layer, direction, phase), 0.0) for phase in NAMED_TIMES[name])
        return total / self.passes[layer, direction]

    def mean_over_layers(self, name: str) -> float:
        return sum(self.mean(layer, direction, name) for layer, direction in self.passes)


class RouterTiming(L.Callback):
    """Logs router_time/* (sums over layers) and router_time_layer/* at the trainer's logging interval.

    On a GPU the times are CUDA events read only once the GPU has passed them, so no step ever waits; on the CPU they
    are wall time. Validation has its own totals; the sanity check is not counted. Each rank times itself, and rank
    zero's times are logged. Backward has no T_index and T_permute of its own, only T_pack.

    Args:
        enabled: off leaves the layers untouched and costs nothing.
        per_layer: also log each layer and direction by itself.
    """

    def __init__(self, enabled: bool = True, per_layer: bool = True) -> None:
        self.enabled = enabled
        self.per_layer = per_layer
        self._clock: PhaseClock | None = None
        self._interval, self._run = _Totals(), _Totals()
        self._evaluation = _Totals()
        self._interval_began = self._run_began = 0.0
        self._interval_batches = self._run_batches = 0
        self._paused = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put a clock into every MoE layer."""
        layers = moe_layers(pl_module)
        if self.enabled and layers:
            self._clock = PhaseClock(len(layers))
            for layer, layer_clock in zip(layers, self._clock.layers, strict=True):
                layer.mark = layer_clock

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the clocks out again."""
        self._clock = None
        for layer in moe_layers(pl_module):
            layer.mark = no_mark

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of steps, after the sanity check."""
        self._drop_finished()
        self._interval_began = self._run_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect finished passes; log at the interval."""
        if self._clock is None:
            return
        self._interval_batches += 1
        self._run_batches += 1
        for times in self._clock.drain():
            self._interval.add(times)
            self._run.add(times)
        if at_log_step(trainer) and self._interval.passes:
            self._log(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of training steps."""
        self._paused = time.perf_counter()
        self._evaluation = _Totals()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect forward passes of validation, apart from those of training."""
        if self._clock is None:
            return
        for times in self._clock.drain():
            if not trainer.sanity_checking:
                self._evaluation.add(times)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the forward times of validation; resume the clock of training steps."""
        if self._evaluation.passes:
            means = {f"router_time_val/{name}_ms": self._evaluation.mean_over_layers(name) for name in NAMED_TIMES}
            log_metrics(trainer, means)
        paused = time.perf_counter() - self._paused
        self._interval_began += paused
        self._run_began += paused

    def run_times(self) -> RouteTimes | None:
        """Means over the whole training run so far; None before the first finished pass or when off."""
        if not self._run.passes:
            return None
        step = 1e3 * (time.perf_counter() - self._run_began) / self._run_batches
        return RouteTimes({name: self._run.mean_over_layers(name) for name in NAMED_TIMES}, step)

    def _log(self, trainer: L.Trainer) -> None:
        now = time.perf_counter()
        step = 1e3 * (now - self._interval_began) / self._interval_batches
        totals = self._interval
        times = RouteTimes({name: totals.mean_over_layers(name) for name in NAMED_TIMES}, step)
        metrics = {f"router_time/{name}_ms": value for name, value in times.milliseconds.items()}
        metrics["router_time/step_ms"] = step
        metrics["router_time/T_route_share"] = times.route_share
        if self.per_layer:
            for layer, direction in totals.passes:
                for name in NAMED_TIMES:
                    metrics[f"router_time_layer/L{layer}/{direction}/{name}_ms"] = totals.mean(layer, direction, name)
        log_metrics(trainer, metrics)
        self._interval, self._interval_began, self._interval_batches = _Totals(), now, 0

    def _drop_finished(self) -> None:
        if self._clock is not None:
            self._clock.drain()
