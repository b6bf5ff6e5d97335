"""Rows of two tables in one order, and apart again: those that came from other ranks, and this one's own.

Shapes: R rows of the first table, O of the second, D width. Each is the other's gradient. They run in a dispatcher that
waits for counts on the host, so they are no ops of the torch library: no compiler sees them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops import native


def _join(first_RD: Tensor, second_OD: Tensor, places: Tensor) -> Tensor:
    if not _is_native(first_RD):
        rows = torch.cat([first_RD, second_OD])
        return torch.empty_like(rows).index_copy_(0, places.long(), rows)
    first_RD, second_OD = first_RD.contiguous(), second_OD.contiguous()
    rows = first_RD.new_empty((places.shape[0], first_RD.shape[1]))
    native.module("cuda").join(
        first_RD.data_ptr(), second_OD.data_ptr(), first_RD.shape[0], places.data_ptr(), rows.data_ptr(), *rows.shape,
        native.DTYPE_CODES[rows.dtype], *native.place(rows),
    )  # fmt: skip
    return rows


def _disjoin(rows: Tensor, places: Tensor, first: int) -> tuple[Tensor, Tensor]:
    if not _is_native(rows):
        together = rows[places.long()]
    else:
        rows = rows.contiguous()
        together = torch.empty_like(rows)
        native.module("cuda").unpermute(
            rows.data_ptr(), 0, places.data_ptr(), 0, together.data_ptr(), *rows.shape, 1,
            native.DTYPE_CODES[rows.dtype], *native.place(rows),
        )  # fmt: skip
    return together[:first], together[first:]


def _is_native(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype in native.DTYPE_CODES and native.use_native("ops.join", "auto", "cuda")


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first_RD: Tensor, second_OD: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.first = first_RD.shape[0]
        return _join(first_RD, second_OD, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        [places] = ctx.saved_tensors
        return *_disjoin(grad, places, ctx.first), None


class _Disjoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places)
        return _disjoin(rows, places, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor, grad_OD: Tensor) -> tuple[Tensor, None, None]:
        return _join(grad_RD, grad_OD, *ctx.saved_tensors), None, None


def join(first_RD: Tensor, second_OD: Tensor, places: Tensor) -> Tensor:
    """Row i of the first table, then of the second, goes to ``rows[places[i]]``, (R + O, D).

    Raises:
        ValueError: there is not one place for each row.
    """
    if first_RD.shape[0] + second_OD.shape[0] != places.shape[0] or first_RD.shape[1:] != second_OD.shape[1:]:
        raise ValueError(
            "ops.join: tables (R, D) and (O, D) must have R + O places, got "
            f"{tuple(first_RD.shape)}, {tuple(second_OD.shape)}, places={places.shape[0]}"
        )
    return _Join.apply(first_RD, second_OD, places)


def disjoin(rows: Tensor, places: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Undo `join`: the table of the first so many rows, (R, D), and the second, (O, D).

    Raises:
        ValueError: there is not one place for each row.
    """
    if rows.shape[0] != places.shape[0]:
        raise ValueError(
            f"ops.disjoin: rows (N, D) must have N places, got {tuple(rows.shape)}, places={places.shape[0]}"
        )
    return _Disjoin.apply(rows, places, first)
