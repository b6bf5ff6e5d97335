"""Dispatch and combine alone: by all-to-alls, and by writing to other ranks' memory.

Names are in docs/benchmarks.md. A movement there is all between a selection and rows that the experts can work on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from moe_lightning.expert_parallel.all_to_all import AllToAllDispatcher, PendingSplits, Splits
from moe_lightning.expert_parallel.collectives import AllToAll, Work
from moe_lightning.expert_parallel.symmetric import SymmetricDispatcher
from moe_lightning.ops import Selection
from moe_lightning.ops.buffer import Segment, empty
from moe_lightning.ops.symmetric import barrier

Calls = dict[str, Callable[[], Any]]


def all_to_all_movement(dispatcher: AllToAllDispatcher, x_TD: Tensor, selection: Selection) -> Calls:
    """By a dispatcher with blocking all-to-alls; `T_all_to_all`: the same rows in one whose splits are known."""
    dispatched = dispatcher.dispatch(x_TD, selection)
    [send], [recv], _ = dispatched.handle.splits
    rows = x_TD.new_zeros(sum(send), x_TD.shape[1])

    def bare() -> Tensor:
        all_to_all = AllToAll(dispatcher.group, send, recv)
        all_to_all.start(rows)
        return all_to_all.wait()

    return {
        "T_dispatch": lambda: dispatcher.dispatch(x_TD, selection),
        "T_all_to_all": bare,
        "T_combine": lambda: dispatcher.combine(dispatched.rows, dispatched),
    }


def symmetric_movement(dispatcher: SymmetricDispatcher, x_TD: Tensor, selection: Selection) -> Calls:
    """By a dispatcher that writes to other ranks' memory; on a GPU also as CUDA graphs."""
    dispatched = dispatcher.dispatch(x_TD, selection)
    # Where experts write their outputs.
    outputs = dispatcher.memory.scratch("combine", tuple(dispatched.rows.shape), x_TD.dtype).own

    def dispatch() -> None:
        dispatcher.release(dispatcher.dispatch(x_TD, selection))

    def combine() -> Tensor:
        barrier(dispatcher.memory.signals)  # which between two passes the next dispatch does
        return dispatcher.combine(outputs, dispatched)

    calls: Calls = {"T_dispatch": dispatch, "T_combine": combine}
    if x_TD.is_cuda:
        calls |= {f"{name}_graph": _graph(call) for name, call in calls.items()}
    return calls


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads of the process group may query the device meanwhile.
    with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def exchanges(dispatcher: AllToAllDispatcher, splits: Splits, x_TD: Tensor, times: int) -> Callable[[], Any]:
    """A layer's all-to-alls alone, dispatch and combine; backward has as many again."""
    [send], [recv], _ = splits
    rows = x_TD.new_zeros(sum(send), x_TD.shape[1])

    def call() -> Tensor:
        moved = rows
        for _ in range(times):
            dispatch = AllToAll(dispatcher.group, send, recv)
            for all_to_all in (dispatch, dispatch.transpose()):
                all_to_all.start(moved)
                moved = all_to_all.wait()
        return moved

    return call


class StubWork(Work):
    """Returns rows of this rank in place of those of others."""

    @override
    def start(
        self,
        rows: Tensor,
        group: dist.ProcessGroup,
        send: Sequence[int],
        recv: Sequence[int],
        into: Segment | None = None,
    ) -> Tensor:
        """The first of the rows sent, as many as would arrive; or whatever is in the memory they would arrive in."""
        count = sum(recv)
        if into is not None:
            received = empty((count, *rows.shape[1:]), rows, into)
        else:
            received = rows.new_zeros((count, *rows.shape[1:])) if rows.shape[0] < count else rows[:count]
        self._tensors = rows, received
        return received

    @override
    def wait(self) -> Tensor:
        received = self._tensors[1]
        self._tensors = ()
        return received


class StubAllToAll(AllToAll):
    """Sends nothing."""

    work_class = StubWork


class StubDispatcher(AllToAllDispatcher):
    """Exchanges counts in its first pass alone, and rows never; for one selection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts: PendingSplits | None = None

    @override
    def all_to_all(self, send: Sequence[int], recv: Sequence[int], name: str = "dispatch") -> AllToAll:
        return StubAllToAll(self.group, send, recv, name)

    @override
    def _exchange_counts(self, send_WCL: Tensor) -> PendingSplits:
        if self._counts is None:
            self._counts = super()._exchange_counts(send_WCL)
        return self._counts
