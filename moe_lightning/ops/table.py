"""Rows of one table that several calls fill, side by side, so that nobody has to bring them together.

Shapes: N rows of the table, D width. Their gradients are in `layers.crossing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Take = Callable[[Tensor], Tensor]
"""Memory for some rows, of the width, dtype and device of those given."""


class Table:
    """Memory for a table, made when its first segment is taken; a segment is given once, then from a new table.

    Args:
        counts: rows of each segment.
        rows: N, those of the segments or more; what is left over is behind them.
    """

    def __init__(self, counts: Sequence[int], rows: int) -> None:
        self._counts, self._rows = counts, rows
        self._left: dict[int, Tensor] = {}

    def segment(self, i: int) -> Take:
        """What takes segment i; all must be taken alike, or it raises ValueError."""
        return partial(self._take, i)

    def _take(self, i: int, like: Tensor) -> Tensor:
        if i not in self._left:
            whole = like.new_empty((self._rows, like.shape[1]))
            # No views: autograd would take a write to one of them for a write to all.
            self._left = {i: part.data for i, part in enumerate(split(whole, self._counts))}
        part = self._left.pop(i)
        if part.dtype != like.dtype or part.shape[1] != like.shape[1]:
            raise ValueError(
                "ops.table: the segments of a table must be taken for rows of one width and dtype, got "
                f"{part.shape[1]} {part.dtype}, then {like.shape[1]} {like.dtype}"
            )
        return part


def split(rows_ND: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of so many rows each."""
    return rows_ND.split_with_sizes([*counts, rows_ND.shape[0] - sum(counts)])[: len(counts)]


def assemble(parts: Sequence[Tensor], rows: int) -> Tensor:
    """The parts as one table (N, ...), in their order; without a copy where they begin its memory so, as in a `Table`.

    What is behind them is whatever the memory holds.

    Raises:
        ValueError: the parts have more than N rows.
    """
    behind = rows - sum(part.shape[0] for part in parts)
    if behind < 0:
        raise ValueError(
            f"ops.table: parts must not have more rows than their table, got rows={rows}, parts of "
            f"{[part.shape[0] for part in parts]}"
        )
    shape = parts[0].shape[1:]
    filled, elements = [part for part in parts if part.numel()], rows * shape.numel()
    if filled and _side_by_side(filled, elements):
        return filled[0].data.as_strided((elements,), (1,)).view(rows, *shape)
    return torch.cat([*parts, parts[0].new_empty((behind, *shape))])


def _side_by_side(parts: Sequence[Tensor], elements: int) -> bool:
    """Whether they follow one another from the beginning of a piece of memory of so many elements."""
    first = parts[0]
    at, size = first.data_ptr(), first.element_size()
    if first.storage_offset() or first.untyped_storage().nbytes() != elements * size:
        return False
    for part in parts:
        if part.data_ptr() != at or not part.is_contiguous():
            return False
        at += part.numel() * size
    return True
