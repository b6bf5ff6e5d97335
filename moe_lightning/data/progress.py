"""A progress bar that stays away from quick work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def slow_progress(title: str, total: int | None, after_s: float = 3.0) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(amount)``; a bar on stderr appears once the work has taken ``after_s`` seconds.

    Without a ``total`` the bar shows that the work goes on: call ``advance(0)`` from time to time.
    """
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total)
    start = time.monotonic()

    def advance(amount: int) -> None:
        bar.advance(task, amount)
        if not bar.live.is_started and time.monotonic() - start > after_s:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
