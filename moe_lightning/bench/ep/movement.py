"""What moving the rows costs, there and back: by exchanges, and straight into other ranks' memory.

Names are in docs/benchmarks.md. A movement there is all between a selection and rows that the experts can work on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.expert_parallel.exchange import Exchange, Transfer
from moe_lightning.expert_parallel.parallel_dispatch import ParallelDispatcher, ParallelPlan
from moe_lightning.expert_parallel.symmetric_dispatch import SymmetricDispatcher
from moe_lightning.expert_parallel.traffic import Traffic
from moe_lightning.ops import Selection
from moe_lightning.ops.symmetric import meet
from moe_lightning.ops.table import Take

Calls = dict[str, Callable[[], Any]]


def exchanged(dispatcher: ParallelDispatcher, x_TD: Tensor, selection: Selection) -> Calls:
    """By a dispatcher that waits for each exchange; bare: the same rows in an all_to_all whose counts are known."""
    plan = dispatcher.plan(selection)
    parts = list(dispatcher.dispatch(x_TD, plan))
    [(there, _)] = plan.ways
    rows = x_TD.new_zeros(sum(there.send), x_TD.shape[1])

    def bare() -> Tensor:
        way = Exchange(there.group, there.send, there.receive)
        way.begin(rows)
        return way.end()

    def combine() -> Tensor:
        return dispatcher.combine([rows for part in parts for rows in dispatcher.send_back(part.rows, part)], plan)

    return {
        "T_dispatch": lambda: list(dispatcher.dispatch(x_TD, dispatcher.plan(selection))),
        "T_all_to_all": bare,
        "T_combine": combine,
    }


def written(dispatcher: SymmetricDispatcher, x_TD: Tensor, selection: Selection) -> Calls:
    """By a dispatcher that writes to other ranks' memory; on a GPU also as CUDA graphs."""
    plan = dispatcher.plan(selection)
    [part] = dispatcher.dispatch(x_TD, plan)
    done = part.rows if part.buffer is None else part.buffer  # where experts leave their rows

    def dispatch() -> Any:
        return dispatcher.dispatch(x_TD, dispatcher.plan(selection))

    def combine() -> Tensor:
        meet(dispatcher.memory.signals)  # which between two passes the next dispatch does
        return dispatcher.combine([done], plan, weighted=True)

    calls: Calls = {"T_dispatch": dispatch, "T_combine": combine}
    if x_TD.is_cuda:
        calls |= {f"{name}_graph": _graph(call) for name, call in calls.items()}
    return calls


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads of the process group may ask the device something meanwhile.
    with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def exchanges(plan: ParallelPlan, x_TD: Tensor, times: int) -> Callable[[], Any]:
    """A layer's exchanges alone, there and back; backward has as many again."""
    [(there, _)] = plan.ways
    rows = x_TD.new_zeros(sum(there.send), x_TD.shape[1])

    def call() -> Tensor:
        back = rows
        for _ in range(times):
            for way in (Exchange(there.group, there.send, there.receive), there.reverse()):
                way.begin(back)
                back = way.end()
        return back

    return call


class CannedTransfer(Transfer):
    """Hands over rows that were there before."""

    def begin(
        self, rows: Tensor, group: dist.ProcessGroup, send: list[int], receive: list[int], take: Take | None = None
    ) -> Tensor:
        """Rows sent before, again and again, as many as would come; or whatever is in the memory they would come to."""
        count = sum(receive)
        if take is not None:
            arrived = take(rows)
        else:
            arrived = rows.new_zeros((count, *rows.shape[1:])) if rows.shape[0] < count else rows[:count]
        self._tensors = rows, arrived
        return arrived

    def end(self) -> Tensor:
        """At once."""
        arrived = self._tensors[1]
        self._tensors = ()
        return arrived


class CannedDispatcher(ParallelDispatcher):
    """Knows from its first plan what comes; for one selection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told: Traffic | None = None

    def transfer(self, name: str) -> Transfer:
        """Nothing carries anything."""
        return CannedTransfer(name)

    def _tell(self, leaving_WCL: Tensor) -> Traffic:
        if self._told is None:
            self._told = super()._tell(leaving_WCL)
        return self._told
