"""CPU times of calls, by `torch.utils.benchmark`, and an allocator that does not disturb them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.progress import Progress

from moe_lightning.bench.interleave import interleave
from moe_lightning.bench.router.parts import Make

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


def measure(makes: dict[str, Make], rounds: int, progress: Progress) -> dict[str, float]:
    """Median microseconds of each call; they take turns."""
    calls = {name: make(False) for name, make in makes.items()}
    return interleave(calls, rounds, torch.get_num_threads(), progress, MOST_SECONDS)
