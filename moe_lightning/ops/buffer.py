"""One preallocated tensor whose segments several calls fill, so that no copy brings them together.

Shapes: N rows of the whole, any trailing shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SegmentedBuffer:
    """Memory for N rows, allocated when its first segment is taken.

    A segment is given once; asked for again, it is of a new tensor, so that the first one stays as it is.

    Args:
        counts: rows of each segment.
        rows: N, those of the segments or more; the rest is after them.
    """

    def __init__(self, counts: Sequence[int], rows: int) -> None:
        self._counts, self._rows = counts, rows
        self._free: dict[int, Tensor] = {}

    def take(self, i: int, like: Tensor) -> Tensor:
        """Segment i, uninitialised, of the trailing shape, dtype and device of `like`.

        Raises:
            ValueError: another segment of the tensor was taken for rows of another kind.
        """
        if i not in self._free:
            whole = like.new_empty((self._rows, *like.shape[1:]))
            # No views: autograd would take a write to one of them for a write to all.
            self._free = {i: part.data for i, part in enumerate(split(whole, self._counts))}
        part = self._free.pop(i)
        if part.dtype != like.dtype or part.shape[1:] != like.shape[1:]:
            raise ValueError(
                "ops.buffer: all segments of a buffer must be taken for rows of one shape and dtype, got "
                f"{tuple(part.shape[1:])} {part.dtype}, then {tuple(like.shape[1:])} {like.dtype}"
            )
        return part


class Segment(NamedTuple):
    """Segment i of a buffer that is not allocated yet."""

    buffer: SegmentedBuffer
    i: int

    def take(self, like: Tensor) -> Tensor:
        """See `SegmentedBuffer.take`."""
        return self.buffer.take(self.i, like)


def empty(shape: tuple[int, ...], like: Tensor, into: Segment | None) -> Tensor:
    """An uninitialised tensor like another, in a segment where one is given."""
    return like.new_empty(shape) if into is None else into.take(like)


def split(rows_ND: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of so many rows each."""
    return rows_ND.split_with_sizes([*counts, rows_ND.shape[0] - sum(counts)])[: len(counts)]


def assemble(parts: Sequence[Tensor], rows: int) -> Tensor:
    """The parts as one tensor (N, ...), in their order; what is after them is whatever the memory holds.

    Without a copy where they lie in its memory in this way, as the segments of a `SegmentedBuffer` do.

    Raises:
        ValueError: the parts have more than N rows.
    """
    rest = rows - sum(part.shape[0] for part in parts)
    if rest < 0:
        raise ValueError(
            f"ops.buffer: parts must not have more rows than their whole, got rows={rows}, parts of "
            f"{[part.shape[0] for part in parts]}"
        )
    shape = parts[0].shape[1:]
    filled, elements = [part for part in parts if part.numel()], rows * shape.numel()
    if filled and _side_by_side(filled, elements):
        return filled[0].data.as_strided((elements,), (1,)).view(rows, *shape)
    return torch.cat([*parts, parts[0].new_empty((rest, *shape))])


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
