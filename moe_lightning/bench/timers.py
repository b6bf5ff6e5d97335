"""Timing several variants of one piece of work, interleaved, in one run: on the CPU here, on a GPU by `gpu_timers`."""

from __future__ import annotations

import ctypes
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.utils.benchmark import Timer

from moe_lightning.bench.calls import Call, CallFactory
from moe_lightning.bench.gpu_timers import measure_on_gpu
from moe_lightning.bench.spread import FEWEST_ROUNDS, Spread
from moe_lightning.callbacks.clocks import CudaEvent, HostEvent

ROUND_SECONDS = 0.01  # one round of one variant, if nothing else is asked for


def orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """The names in a new random order each round, the same in every process: none always follows the same other."""
    known, draw = list(names), random.Random(0)
    for _ in range(rounds):
        yield draw.sample(known, len(known))


def interleave(
    variants: dict[str, Callable[[], Any]],
    rounds: int = 25,
    threads: int = 1,
    progress: Progress | None = None,
    most_seconds: float = math.inf,
    round_seconds: float = ROUND_SECONDS,
) -> dict[str, Spread]:
    """Microseconds per call of each variant, over the rounds.

    The variants are interleaved, in a new random order each round: what else the machine does slows all of them, and
    what a variant leaves, such as a hot device, slows no other one always. On CUDA the timer waits for the device at
    the end of each round. A variant that has had `most_seconds` and `FEWEST_ROUNDS` skips the rounds that are left.
    """
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in variants.items()}
    calls = {name: max(1, int(round_seconds / timer.timeit(1).median)) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    bar = progress or Progress(disable=True)
    task = bar.add_task("timing", total=rounds)
    for order in orders(variants, rounds):
        for name in order:
            timer = timers[name]
            if len(times[name]) < FEWEST_ROUNDS or sum(times[name]) * calls[name] < most_seconds * 1e6:
                times[name].append(timer.timeit(calls[name]).median * 1e6)
        bar.advance(task)
    bar.remove_task(task)
    return {name: Spread.of(values) for name, values in times.items()}


COLD_ROUNDS = 11
MOST_SECONDS = 2.0  # that one call gets, unless it is slower than that

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h


def seconds_per_call(call: Call, count: int, device: torch.device) -> float:
    """Of `count` calls in a loop: between two events on a GPU, else on the host."""
    events: list[Any] = [CudaEvent() if device.type == "cuda" else HostEvent() for _ in range(2)]
    events[0].record()
    for _ in range(count):
        call()
    events[1].record()
    if device.type == "cuda":
        events[1].event.synchronize()
    return 1e-3 * events[0].milliseconds_until(events[1]) / count


def keep_freed_memory() -> None:
    """Have malloc hand freed memory out again instead of returning it to the system, for the life of the process.

    Otherwise a call's outputs are now and then paid for in page faults, twice what the call itself takes; torch's
    allocator on a GPU caches too. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch and the native kernels use this many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_on_cpu(factories: dict[str, CallFactory], rounds: int, progress: Progress) -> dict[str, dict[str, Spread]]:
    """eager_us and cold_us of each call; the calls are interleaved."""
    calls = {name: make(False) for name, make in factories.items()}
    eager_us = interleave(calls, rounds, torch.get_num_threads(), progress, MOST_SECONDS)
    cold_us = _cold(calls, min(rounds, COLD_ROUNDS), progress)
    return {name: {"eager_us": eager_us[name], "cold_us": cold_us[name]} for name in calls}


def cache_bytes() -> int:
    """The largest cache; 32 MiB where the system does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().removesuffix("K")) << 10 for file in files), default=32 << 20)


def _cold(calls: dict[str, Call], rounds: int, progress: Progress) -> dict[str, Spread]:
    """Microseconds of single calls, each after a write to more memory than the caches hold."""
    buffer = torch.zeros(2 * cache_bytes() // 4)
    measured: dict[str, list[float]] = {name: [] for name in calls}
    task = progress.add_task("cold", total=rounds)
    for _ in range(rounds):
        for name, call in calls.items():
            buffer.add_(1)
            began = time.perf_counter()
            outputs = call()
            measured[name].append(1e6 * (time.perf_counter() - began))
            del outputs
        progress.advance(task)
    progress.remove_task(task)
    return {name: Spread.of(values) for name, values in measured.items()}


@dataclass(frozen=True)
class Times:
    """Microseconds per call; None where the device has no such thing or it cannot be measured."""

    eager_us: Spread
    graph_us: Spread | None = None
    cold_us: Spread | None = None
    host_us: Spread | None = None
    launches: int | None = None


def time_calls(
    factories: dict[str, CallFactory], reads: dict[str, int], device: torch.device, rounds: int, progress: Progress
) -> dict[str, Times]:
    """Time all calls side by side. `reads` are the bytes of each call's inputs, which say how many copies of them
    the L2 cache cannot hold.
    """
    if device.type == "cpu":
        measured = measure_on_cpu(factories, rounds, progress)
        return {name: Times(us["eager_us"], cold_us=us["cold_us"]) for name, us in measured.items()}
    return {
        name: Times(**measured) for name, measured in measure_on_gpu(factories, reads, device, rounds, progress).items()
    }


COLUMN_NAMES = {
    "cuda": {"cold_us": "CUDA graph, L2 cold", "graph_us": "CUDA graph, L2 warm", "eager_us": "eager"},
    "cpu": {"cold_us": "caches cold", "eager_us": "eager"},
}


def headline(*rows: dict[str, Any]) -> str:
    """The time that all rows have: cold, else graph, else eager, as a roofline counts every byte from memory."""
    return next(c for c in ("cold_us", "graph_us", "eager_us") if all(row[c] is not None for row in rows))


def timed_as(rows: list[dict[str, Any]], device: torch.device) -> str:
    """How the `headline` of these rows was measured, in words."""
    return COLUMN_NAMES[device.type][headline(*rows)]
