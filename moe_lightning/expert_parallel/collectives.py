"""Collectives of expert parallelism: rows between ranks, started and waited for apart, and what a timer sees of them.

A rank without rows takes part all the same. What autograd sees of an all-to-all is in `all_to_all_autograd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.ops.buffer import Segment, empty
from moe_lightning.utils.errors import annotate_error


# ---- events ----------------------------------------------------------------------------------------------
class CommEvent(IntEnum):
    """Of a movement between ranks, as the computing stream reaches it."""

    START = 0
    WAIT = 1
    END = 2


class Comm(Protocol):
    """What a hook may ask of a movement between ranks."""

    name: str
    """dispatch/forward, combine/forward, and both backward."""
    on_gpu: bool
    work: Any
    """What another stream can wait for; None where the computing stream itself carries the rows."""

    @property
    def bytes_received(self) -> int:
        """From other ranks; known once the end has been reached."""


class CommHook(Protocol):
    """Called at each event of each movement."""

    def __call__(self, comm: Comm, event: CommEvent, /) -> None: ...  # noqa: D102


@runtime_checkable
class HasCommHook(Protocol):
    """A dispatcher that moves rows between ranks."""

    comm_hook: CommHook | None


class Movement:
    """A movement on the computing stream, whose size is known on the device.

    Args:
        name: dispatch or combine, forward or backward.
        on_gpu: whether the rows are.
    """

    work = None

    def __init__(self, name: str, on_gpu: bool) -> None:
        self.name, self.on_gpu = name, on_gpu
        self._count: Tensor | None = None
        self._row_bytes = 0

    def received(self, count: Tensor, row_bytes: int, into: Tensor | None = None) -> None:
        """So many rows, a scalar on their device, of so many bytes each; the host does not wait for it.

        A CUDA graph that captures this copies the count `into` pinned memory at each replay.
        """
        self._count = count.to("cpu", non_blocking=True) if into is None else into.copy_(count, non_blocking=True)
        self._row_bytes = row_bytes

    @property
    def bytes_received(self) -> int:
        """From other ranks; known once the end has been reached."""
        return 0 if self._count is None else int(self._count) * self._row_bytes


@contextmanager
def timed_region(hook: CommHook | None, name: str, on_gpu: bool) -> Iterator[Movement | None]:
    """Call the hook, if there is one, at the events around the body."""
    if hook is None:
        yield None
        return
    movement = Movement(name, on_gpu)
    hook(movement, CommEvent.START)
    hook(movement, CommEvent.WAIT)
    yield movement
    hook(movement, CommEvent.END)


# ---- all-to-all ------------------------------------------------------------------------------------------
class Work:
    """One all-to-all of rows in flight; keeps its tensors until it is over.

    Args:
        name: dispatch or combine, forward or backward.
        hook: called at its events.
        async_op: it has a stream of its own, so that other work overlaps with it; else the computing stream carries it,
            which costs the host less.
    """

    def __init__(self, name: str, hook: CommHook | None = None, async_op: bool = False) -> None:
        self.name, self.async_op = name, async_op
        self.work: Any = None
        self.bytes_received = 0
        self.on_gpu = False
        self._hook = hook
        self._tensors: tuple[Tensor, ...] = ()

    def start(
        self,
        rows: Tensor,
        group: dist.ProcessGroup,
        send: Sequence[int],
        recv: Sequence[int],
        into: Segment | None = None,
    ) -> Tensor:
        """Send rows; what is returned, in `into` if given, may be read after `wait`."""
        if rows.shape[0] != sum(send):
            raise ValueError(
                f"all_to_all: rows must be as many as the splits say, got rows={rows.shape[0]}, splits={list(send)}"
            )
        rows = rows.contiguous()
        self.on_gpu = rows.is_cuda
        received = empty((sum(recv), *rows.shape[1:]), rows, into)
        self.bytes_received = received.nbytes
        self._tensors = rows, received
        self._announce(CommEvent.START)
        if not self.async_op:
            self._announce(CommEvent.WAIT)
        with annotate_error(self.name):
            self.work = dist.all_to_all_single(
                received, rows, list(recv), list(send), group=group, async_op=self.async_op
            )
        if not self.async_op:
            self._announce(CommEvent.END)
        return received

    def wait(self) -> Tensor:
        """The rows that were received."""
        if self.async_op:
            self._announce(CommEvent.WAIT)
            with annotate_error(self.name):
                self.work.wait()
            self._announce(CommEvent.END)
        received = self._tensors[1]
        self.work, self._tensors = None, ()
        return received

    def _announce(self, event: CommEvent) -> None:
        if self._hook is not None:
            self._hook(self, event)


class AllToAll:
    """Rows sorted by rank to each rank of a group, and from each; gradients take the transposed way.

    Args:
        group: the ranks.
        send: rows to each.
        recv: rows from each.
        name: dispatch or combine.
        hook: called at the events of both directions.
        async_op: see `Work`.
    """

    work_class = Work

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Sequence[int],
        recv: Sequence[int],
        name: str = "dispatch",
        hook: CommHook | None = None,
        async_op: bool = False,
    ) -> None:
        self.group, self.send, self.recv = group, send, recv
        self._options = hook, async_op
        self._forward, self._backward = (
            self.work_class(f"{name}/{direction}", hook, async_op) for direction in ("forward", "backward")
        )

    def start(self, rows: Tensor, into: Segment | None = None) -> Tensor:
        """Send rows (S, D); those received (R, D) may be read after `wait`.

        Raises:
            ValueError: the rows are not as many as the splits say.
        """
        return self._forward.start(rows, self.group, self.send, self.recv, into)

    def wait(self) -> Tensor:
        """The rows that were received."""
        return self._forward.wait()

    def start_backward(self, grad: Tensor, into: Segment | None = None) -> Tensor:
        """Send the gradient (R, D) of received rows; what comes (S, D) may be read after `wait_backward`."""
        return self._backward.start(grad, self.group, self.recv, self.send, into)

    def wait_backward(self) -> Tensor:
        """The gradient of the rows that were sent."""
        return self._backward.wait()

    def transpose(self, name: str = "combine") -> AllToAll:
        """The way back."""
        return type(self)(self.group, self.recv, self.send, name, *self._options)


# ---- checks ----------------------------------------------------------------------------------------------
def local_experts(num_experts: int, ranks: int) -> int:
    """L, the experts that each rank of a group holds; ValueError unless they are equally many."""
    if num_experts % ranks:
        raise ValueError(
            "dispatch: num_experts must be a multiple of the ranks that share them, got "
            f"num_experts={num_experts}, ranks={ranks}; choose an ep_size that divides it"
        )
    return num_experts // ranks


def check_agreement(group: dist.ProcessGroup, **sizes: int) -> None:
    """Raise ValueError on every rank unless all have the same sizes: others would wait for each other. A collective."""
    own = tuple(sizes.values())
    of_ranks: list[tuple[int, ...]] = [own] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, own, group=group)
    if len(set(of_ranks)) > 1:
        got = ", ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(of_ranks))
        raise ValueError(
            f"dispatch: ranks must agree on ({', '.join(sizes)}), got {got}; give all of them the same configuration"
        )


def check_splits(all_to_all: AllToAll, device: torch.device) -> None:
    """Raise ValueError on every rank unless each sends what the other expects. A collective that waits.

    An all-to-all whose splits disagree is undefined: gloo, for one, goes on with rows that no rank sent.
    """
    world = dist.get_world_size(all_to_all.group)
    own = torch.tensor([list(all_to_all.send), list(all_to_all.recv)], device=device)
    of_ranks = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(of_ranks, own, group=all_to_all.group)
    splits = torch.stack(of_ranks).tolist()
    for sender in range(world):
        for receiver in range(world):
            sent, expected = splits[sender][0][receiver], splits[receiver][1][sender]
            if sent != expected:
                raise ValueError(
                    f"all_to_all: splits disagree: rank {sender} sends {sent}, rank {receiver} expects {expected}"
                )
