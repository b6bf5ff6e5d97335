"""The processes of a benchmark: their group, and times of the slowest rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_lightning.bench.spread import Spread
from moe_lightning.bench.timers import orders, seconds_per_call

ROUND_SECONDS = 0.02  # of one call
TIMEOUT_SECONDS = 120


@contextmanager
def ranks(component: str, backend: str, device_type: str) -> Iterator[torch.device]:
    """Join the group that torchrun set up; the device of this rank."""
    if "RANK" not in os.environ:
        raise ValueError(
            f"{component}: needs several processes, got one; run torchrun --nproc_per_node 2 -m moe_lightning.bench "
            f"{component.partition('.')[2]}"
        )
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def measure(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, Spread]:
    """Microseconds of each call, interleaved: the rounds of the rank whose median is the longest.

    All ranks start a round together and make the same number of calls.
    """
    counts = {name: _count(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for order in orders(calls, rounds):
        for name in order:
            seconds[name].append(_round(calls[name], counts[name], device))
    own = 1e6 * torch.tensor(list(seconds.values()), device=device, dtype=torch.float64)
    of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, own)
    samples = zip(*(each.tolist() for each in of_ranks), strict=True)
    return {name: slowest(of_call) for name, of_call in zip(calls, samples, strict=True)}


def slowest(samples: Iterable[list[float]]) -> Spread:
    """Of one call's rounds on each rank, those of the rank with the longest median."""
    return max(map(Spread.of, samples), key=lambda spread: spread.median)


def _count(call: Callable[[], Any], device: torch.device) -> int:
    _round(call, 2, device)
    seconds = torch.tensor(_round(call, 2, device), device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return max(2, min(100, int(ROUND_SECONDS / float(seconds))))


def _round(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return seconds_per_call(call, count, device)
