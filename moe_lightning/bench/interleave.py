"""Timing several variants of one piece of work side by side, in one run."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.progress import Progress
from torch.utils.benchmark import Timer

from moe_lightning.bench.spread import Spread

ROUND_SECONDS = 0.01  # one round of one variant, if nothing else is asked for
FEWEST_ROUNDS = 3  # of a variant that takes its share of time in fewer


def orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """The names in an order drawn anew each round, the same in every process: none always follows the same one."""
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

    The variants take turns, in an order drawn anew each round: what else the machine does falls on all of them alike,
    and what a variant leaves behind, such as a hot device, on no one neighbour. On CUDA the timer waits for the device
    at the end of each round. A variant that has had `most_seconds` and `FEWEST_ROUNDS`
    sits out the others.
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
