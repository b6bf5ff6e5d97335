"""Timing several variants of one piece of work side by side, in one run."""

from collections.abc import Callable
from statistics import median
from typing import Any

from rich.progress import Progress
from torch.utils.benchmark import Timer

ROUND_SECONDS = 0.01  # one round of one variant


def interleave(
    variants: dict[str, Callable[[], Any]], rounds: int = 25, threads: int = 1, progress: Progress | None = None
) -> dict[str, float]:
    """Median microseconds a call of each variant.

    The variants take turns, so that whatever else the machine does falls on all of them alike. On CUDA the
    timer waits for the device at the end of each round.
    """
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in variants.items()}
    calls = {name: max(1, int(ROUND_SECONDS / timer.timeit(3).median)) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    bar = progress or Progress(disable=True)
    task = bar.add_task("timing", total=rounds)
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls[name]).median * 1e6)
        bar.advance(task)
    bar.remove_task(task)
    return {name: median(values) for name, values in times.items()}
