"""Rows between the ranks of a group, begun and awaited apart, so that other work runs beside the transfer.

What autograd sees of them is in `crossing`. A rank without rows takes part all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.ops.room import count_transfers
from moe_lightning.ops.table import Take


class Moment(IntEnum):
    """Of a transfer, as the computing stream passes it."""

    BEGIN = 0
    WAIT = 1
    END = 2


class Watched(Protocol):
    """What a timer wants to know of a movement between ranks."""

    name: str
    """Dispatch or combine, forward or backward."""
    on_gpu: bool
    work: Any
    """What another stream can wait for; None where the computing stream itself carries the rows."""

    @property
    def bytes_received(self) -> int:
        """From other ranks; to be asked once the end has passed."""


class Watcher(Protocol):
    """The seat of a timer: told of every moment of every movement."""

    def __call__(self, transfer: Watched, moment: Moment) -> None:
        """Take the time now."""


@runtime_checkable
class Watchable(Protocol):
    """A dispatcher that moves rows between ranks."""

    watch: Watcher | None


class Exchange:
    """Rows to each rank of the group and from it, in the order of the ranks; their gradients go the other way."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Sequence[int],
        receive: Sequence[int],
        transfer: Callable[[str], Transfer] | None = None,
        name: str = "dispatch",
    ) -> None:
        self.group = group
        self.send, self.receive = list(send), list(receive)
        self._make = transfer or Transfer
        self._forward, self._backward = self._make(f"{name}/forward"), self._make(f"{name}/backward")

    def begin(self, rows: Tensor, take: Take | None = None) -> Tensor:
        """Send rows (S, D), sorted by rank; those that come (R, D), sorted too, may be looked at after `end`.

        Raises:
            ValueError: the rows are not as many as the counts say.
        """
        return self._forward.begin(rows, self.group, self.send, self.receive, take)

    def end(self) -> Tensor:
        """Wait for the rows."""
        return self._forward.end()

    def begin_backward(self, grad: Tensor, take: Take | None = None) -> Tensor:
        """Send the gradient (R, D) of the rows that came; what comes (S, D) may be looked at after `end_backward`."""
        return self._backward.begin(grad, self.group, self.receive, self.send, take)

    def end_backward(self) -> Tensor:
        """Wait for the gradient."""
        return self._backward.end()

    def reverse(self) -> Exchange:
        """The way back."""
        return Exchange(self.group, self.receive, self.send, self._make, "combine")


@contextmanager
def naming(operation: str) -> Iterator[None]:
    """Add a line to a collective's error: its own text says neither what it was for nor what to do."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"exchange: every rank of a group must come to {operation}, got an error instead; if the other ranks did "
            "come, their logs say what stopped them"
        )
        raise


def check_agreement(group: dist.ProcessGroup, **sizes: int) -> None:
    """Raise ValueError on every rank unless all have the same sizes: others would wait for each other for ever."""
    mine = tuple(sizes.values())
    found: list[tuple[int, ...]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    if len(set(found)) > 1:
        got = ", ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(found))
        raise ValueError(
            f"dispatch: ranks must agree on ({', '.join(sizes)}), got {got}; give all of them the same configuration"
        )


def check_counts(exchange: Exchange, device: torch.device) -> None:
    """Raise ValueError on every rank unless each sends what the other expects. A collective that waits.

    A transfer whose counts disagree is undefined: gloo, for one, goes on with rows that nobody sent.
    """
    world = dist.get_world_size(exchange.group)
    mine = torch.tensor([exchange.send, exchange.receive], device=device)
    all_ranks = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(all_ranks, mine, group=exchange.group)
    counts = torch.stack(all_ranks).tolist()
    for sender in range(world):
        for receiver in range(world):
            sent, expected = counts[sender][0][receiver], counts[receiver][1][sender]
            if sent != expected:
                raise ValueError(
                    f"exchange: all_to_all counts disagree: rank {sender} sends {sent}, rank {receiver} expects "
                    f"{expected}"
                )


class Transfer:
    """A collective under way; holds its tensors until it is over.

    Args:
        name: of the direction: dispatch or combine, forward or backward.
        watch: told of its moments.
        beside: it has a stream of its own, so that other work runs beside it; else the computing stream carries it,
            which costs the host less.
    """

    def __init__(self, name: str, watch: Watcher | None = None, beside: bool = False) -> None:
        self.name, self.beside = name, beside
        self.work: Any = None
        self.bytes_received = 0
        self.on_gpu = False
        self._watch = watch
        self._tensors: tuple[Tensor, ...] = ()

    def begin(
        self, rows: Tensor, group: dist.ProcessGroup, send: list[int], receive: list[int], take: Take | None = None
    ) -> Tensor:
        """Start it; what is returned may be looked at after `end`. `take` takes the memory of what comes."""
        if rows.shape[0] != sum(send):
            raise ValueError(
                f"exchange: rows must be as many as the counts say, got rows={rows.shape[0]}, counts={send}"
            )
        rows = rows.contiguous()
        self.on_gpu = rows.is_cuda
        arriving = rows.new_empty((sum(receive), *rows.shape[1:])) if take is None else take(rows)
        self.bytes_received = arriving.nbytes
        self._tensors = rows, arriving
        self._tell(Moment.BEGIN)
        if not self.beside:
            self._tell(Moment.WAIT)
        elif self.on_gpu:
            count_transfers(1)
        with naming(self.name):
            self.work = dist.all_to_all_single(arriving, rows, receive, send, group=group, async_op=self.beside)
        if not self.beside:
            self._tell(Moment.END)
        return arriving

    def end(self) -> Tensor:
        """Wait for it."""
        if self.beside:
            self._tell(Moment.WAIT)
            if self.on_gpu:
                count_transfers(-1)
            with naming(self.name):
                self.work.wait()
            self._tell(Moment.END)
        arrived = self._tensors[1]
        self.work, self._tensors = None, ()
        return arrived

    def _tell(self, moment: Moment) -> None:
        if self._watch is not None:
            self._watch(self, moment)
