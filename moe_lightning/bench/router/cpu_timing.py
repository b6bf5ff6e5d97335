"""CPU times of calls, by `torch.utils.benchmark`, and an allocator that does not disturb them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress

from moe_lightning.bench.calls import Call, Make
from moe_lightning.bench.interleave import interleave
from moe_lightning.bench.spread import Spread

COLD_ROUNDS = 11
MOST_SECONDS = 2.0  # that one call gets, unless it is slower than that

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h


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


def measure(makes: dict[str, Make], rounds: int, progress: Progress) -> dict[str, dict[str, Spread]]:
    """eager_us and cold_us of each call; the calls take turns."""
    calls = {name: make(False) for name, make in makes.items()}
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
