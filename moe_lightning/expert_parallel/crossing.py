"""What autograd sees of rows that cross to other ranks and come back: five steps, each with its gradient.

    cut -> depart -> arrive -> (experts) -> turn_back -> come_home

Backward mirrors forward: a gradient is sent where the rows were awaited, and awaited where they were sent. Autograd
runs later nodes first, so what ran beside a transfer in forward runs beside it in backward too. Rows and gradients come
home to where they are summed up (`ops.table`): nobody has to bring them together.

Legend: N slots of this rank, S rows of a chunk sent, R received, O that stay, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.expert_parallel.exchange import Exchange
from moe_lightning.ops.join import disjoin, join
from moe_lightning.ops.table import Table, assemble, split

Grads = tuple[Tensor | None, ...]


class Home:
    """Where a pass's rows come back to, and their gradients.

    Args:
        segments: of each chunk the rows that travel and those that stay.
        slots: N.
    """

    def __init__(self, segments: Sequence[int], slots: int) -> None:
        self.rows, self.grads = Table(segments, slots), Table(segments, slots)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, segments: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.slots, ctx.kept = rows_ND.shape[0], sum(segments)
        return split(rows_ND, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        grad_ND = assemble(grads, ctx.slots)
        if ctx.kept < ctx.slots:
            grad_ND[ctx.kept :] = 0  # nobody adds them up, but anomaly detection looks at them
        return grad_ND, None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(rows_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _placeholder: Tensor) -> Grads:
        return ctx.exchange.end_backward(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _pending_RD: Tensor, staying_OD: Tensor, places: Tensor, exchange: Exchange, grads: Table, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(places)
        ctx.step = exchange, grads, chunk
        return join(exchange.end(), staying_OD, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        [places] = ctx.saved_tensors
        exchange, grads, chunk = ctx.step
        grad_RD, grad_OD = disjoin(grad, places, sum(exchange.receive), grads.segment(2 * chunk + 1))
        exchange.begin_backward(grad_RD, grads.segment(2 * chunk))
        # A placeholder of the right shape: `_Depart` takes what arrives.
        return grad_RD, grad_OD, None, None, None, None


class _TurnBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, places: Tensor, exchange: Exchange, home: Table, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places)
        ctx.exchange = exchange
        leaving_RD, staying_OD = disjoin(rows, places, sum(exchange.send), home.segment(2 * chunk + 1))
        return exchange.begin(leaving_RD, home.segment(2 * chunk)), staying_OD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _placeholder: Tensor, grad_OD: Tensor) -> Grads:
        [places] = ctx.saved_tensors
        return join(ctx.exchange.end_backward(), grad_OD, places), None, None, None, None


class _ComeHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: int, exchanges: Sequence[Exchange], *parts: Tensor) -> Tensor:
        ctx.exchanges, ctx.segments = exchanges, [part.shape[0] for part in parts]
        for exchange in exchanges:
            exchange.end()
        return assemble(parts, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Grads:
        grads = split(grad_ND, ctx.segments)
        for exchange, grad_SD in zip(reversed(ctx.exchanges), grads[-2::-2], strict=True):
            exchange.begin_backward(grad_SD)
        return None, None, *grads  # placeholders beside the gradients of what stayed


def cut(rows_ND: Tensor, segments: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of so many rows each: of each chunk those that travel and those that stay."""
    return _Cut.apply(rows_ND, segments)


def depart(rows_SD: Tensor, exchange: Exchange) -> Tensor:
    """Send a chunk's rows, sorted by rank; the result (R, D) is for `arrive` alone."""
    return _Depart.apply(rows_SD, exchange)


def arrive(
    pending_RD: Tensor, staying_OD: Tensor, places: Tensor, exchange: Exchange, home: Home, chunk: int
) -> Tensor:
    """Wait for a chunk's rows: (R + O, D) with those that stayed, row i of both at ``places[i]``."""
    return _Arrive.apply(pending_RD, staying_OD, places, exchange, home.grads, chunk)


def turn_back(rows: Tensor, places: Tensor, exchange: Exchange, home: Home, chunk: int) -> tuple[Tensor, Tensor]:
    """Send back a chunk's rows that came, in the order in which they did; and those that stayed, (O, D)."""
    return _TurnBack.apply(rows, places, exchange, home.rows, chunk)


def come_home(parts: Sequence[Tensor], exchanges: Sequence[Exchange], slots: int) -> Tensor:
    """Wait for all chunks' rows: (N, D) as they were before `cut`; behind them is whatever the memory holds.

    The gradient leaves by all exchanges at once: who wants one chunk's must want every chunk's.
    """
    return _ComeHome.apply(slots, exchanges, *parts)
