"""Rows of two tables in one order, and apart again: those that came from other ranks, and this one's own.

Shapes: R rows of the first table, O of the second, D width. Autograd does not see them; each is the other's gradient in
`expert_parallel.all_to_all_autograd`. They run in a dispatcher that waits for counts on the host, so they are no ops of
the torch library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.ops import native
from moe_lightning.ops.buffer import Segment, empty


def join(first_RD: Tensor, second_OD: Tensor, places: Tensor) -> Tensor:
    """Row i of the first table, then of the second, goes to ``rows[places[i]]``, (R + O, D).

    Args:
        first_RD: rows of one table.
        second_OD: rows of another.
        places: int32 (R + O).

    Raises:
        ValueError: there is not one place for each row.
    """
    of_first, width = first_RD.shape
    if of_first + second_OD.shape[0] != places.shape[0] or width != second_OD.shape[1]:
        raise ValueError(
            "ops.join: tables (R, D) and (O, D) must have R + O places, got "
            f"{tuple(first_RD.shape)}, {tuple(second_OD.shape)}, places={places.shape[0]}"
        )
    rows = first_RD.new_empty((places.shape[0], width))
    if not _is_native(rows):
        rows.index_copy_(0, places[:of_first].long(), first_RD)
        return rows.index_copy_(0, places[of_first:].long(), second_OD)
    first_RD, second_OD = first_RD.contiguous(), second_OD.contiguous()
    native.module("cuda").permute(
        native.place(rows), x=first_RD.data_ptr(), second_x=second_OD.data_ptr(), first_tokens=of_first,
        inverse_perm=places.data_ptr(), rows=rows.data_ptr(), tokens=rows.shape[0], width=width, top_k=1,
        dtype=native.DTYPE_CODES[rows.dtype],
    )  # fmt: skip
    return rows


def disjoin(rows: Tensor, places: Tensor, first: int, into: Segment | None = None) -> tuple[Tensor, Tensor]:
    """Undo `join`: the table of the first so many rows, (R, D), and the second, (O, D).

    Args:
        rows: (R + O, D).
        places: int32 (R + O).
        first: R.
        into: memory of the second.

    Raises:
        ValueError: there is not one place for each row, or the segment does not hold the second table.
    """
    count, width = rows.shape
    if count != places.shape[0]:
        raise ValueError(
            f"ops.disjoin: rows (N, D) must have N places, got {tuple(rows.shape)}, places={places.shape[0]}"
        )
    first_RD = rows.new_empty((first, width))
    second_OD = empty((count - first, width), rows, into)
    if second_OD.shape != (count - first, width):
        raise ValueError(
            f"ops.disjoin: the second table must get memory for its rows, ({count - first}, {width}), "
            f"got {tuple(second_OD.shape)}"
        )
    if not _is_native(rows):
        torch.index_select(rows, 0, places[:first].long(), out=first_RD)
        torch.index_select(rows, 0, places[first:].long(), out=second_OD)
        return first_RD, second_OD
    rows = rows.contiguous()
    native.module("cuda").split_rows(
        native.place(rows), rows=rows.data_ptr(), inverse_perm=places.data_ptr(), first=first_RD.data_ptr(),
        second=second_OD.data_ptr(), first_rows=first, tokens=count, width=width, top_k=1,
        dtype=native.DTYPE_CODES[rows.dtype],
    )  # fmt: skip
    return first_RD, second_OD


def _is_native(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype in native.DTYPE_CODES and native.use_native("ops.join", "auto", "cuda")
