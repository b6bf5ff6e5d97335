"""Times of calls on either device, in one form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.progress import Progress

from moe_lightning.bench import gpu_timing
from moe_lightning.bench.calls import Make
from moe_lightning.bench.router import cpu_timing
from moe_lightning.bench.spread import Spread


@dataclass(frozen=True)
class Times:
    """Microseconds per call; None where the device has no such thing or it cannot be measured."""

    eager_us: Spread
    graph_us: Spread | None = None
    cold_us: Spread | None = None
    host_us: Spread | None = None
    launches: int | None = None


def time_calls(
    makes: dict[str, Make], reads: dict[str, int], device: torch.device, rounds: int, progress: Progress
) -> dict[str, Times]:
    """Time all calls side by side. `reads` are the bytes of each call's inputs, which say how many copies of them
    the L2 cache cannot hold.
    """
    if device.type == "cpu":
        measured = cpu_timing.measure(makes, rounds, progress)
        return {name: Times(us["eager_us"], cold_us=us["cold_us"]) for name, us in measured.items()}
    return {
        name: Times(**measured) for name, measured in gpu_timing.measure(makes, reads, device, rounds, progress).items()
    }
