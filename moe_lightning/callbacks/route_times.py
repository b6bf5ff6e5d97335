"""The named times of an MoE layer, and their means over passes and layers."""

from __future__ import annotations

from typing import NamedTuple

from moe_lightning.callbacks.phase_clock import Direction, PhaseTimes
from moe_lightning.layers import Phase

#: T_pack = T_index + T_permute, T_route = T_logit + T_select + T_pack.
NAMED_TIMES: dict[str, tuple[Phase, ...]] = {
    "T_logit": (Phase.LOGIT,),
    "T_select": (Phase.SELECT,),
    "T_index": (Phase.INDEX,),
    "T_permute": (Phase.PERMUTE,),
    "T_pack": (Phase.INDEX, Phase.PERMUTE),
    "T_route": (Phase.LOGIT, Phase.SELECT, Phase.INDEX, Phase.PERMUTE),
    "T_experts": (Phase.EXPERTS,),
    "T_unpack": (Phase.UNPACK,),
}

#: In backward their sum is measured, under the phase that comes first.
_FORWARD_ONLY = ("T_index", "T_permute")


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
            for name, phases in NAMED_TIMES.items()
            if direction == "forward" or name not in _FORWARD_ONLY
        }

    def by_layer(self) -> dict[tuple[int, Direction], dict[str, float]]:
        """`of_layer` for every layer and direction seen."""
        return {key: self.of_layer(*key) for key in self._passes}

    def of_step(self, direction: Direction) -> dict[str, float]:
        """Mean milliseconds of a micro-batch, summed over layers, by name; empty where no pass was timed."""
        parts = [self.of_layer(*key) for key in self._passes if key[1] == direction]
        return {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}
