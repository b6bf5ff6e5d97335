"""A movement of rows on the computing stream, for a timer to watch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moe_lightning.expert_parallel.exchange import Moment, Watcher


class Movement:
    """All of it is waited for; how much came is known on the device, and copied beside.

    Args:
        name: dispatch or combine, forward or backward.
        on_gpu: whether the rows are.
    """

    work = None

    def __init__(self, name: str, on_gpu: bool) -> None:
        self.name, self.on_gpu = name, on_gpu
        self._count: Tensor | None = None
        self._row_bytes = 0

    def received(self, count: Tensor, row_bytes: int) -> None:
        """So many rows, a scalar on their device, of so many bytes each."""
        self._count, self._row_bytes = count.to("cpu", non_blocking=True), row_bytes

    @property
    def bytes_received(self) -> int:
        """From other ranks; to be asked once the end has passed."""
        return 0 if self._count is None else int(self._count) * self._row_bytes


@contextmanager
def watched(watch: Watcher | None, name: str, on_gpu: bool) -> Iterator[Movement | None]:
    """Tell the timer, if there is one, of the moments around what is done within."""
    if watch is None:
        yield None
        return
    movement = Movement(name, on_gpu)
    watch(movement, Moment.BEGIN)
    watch(movement, Moment.WAIT)
    yield movement
    watch(movement, Moment.END)
