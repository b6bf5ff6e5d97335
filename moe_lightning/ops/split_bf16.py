"""fp32 numbers as sums of bf16 ones, for products on matrix units that lose nothing, and the sum of such products.

A number is its rounding to bf16, that of what remains, and again: three pieces hold its 24 bits. The kernels take one
pass over memory each. Where an op is traced, the torch form is what the compiler sees and fuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.ops import native
from moe_lightning.ops.library import is_plain

_PIECES = 3


# ---- torch reference -------------------------------------------------------------------------------------
def _split_reference(value: Tensor, order: Sequence[int], dim: int) -> Tensor:
    pieces: list[Tensor] = []
    for _ in range(max(order) + 1):
        pieces.append(value.bfloat16())
        value = value - pieces[-1]
    return torch.cat([pieces[piece] for piece in order], dim)


def _sum_reference(parts: Tensor, dim: int) -> Tensor:
    shape = (*parts.shape[:dim], _PIECES, parts.shape[dim] // _PIECES, *parts.shape[dim + 1 :])
    return parts.view(shape).sum(dim)


# ---- native call -----------------------------------------------------------------------------------------
def _split(value: Tensor, order: Sequence[int], dim: int) -> Tensor:
    value = value.contiguous()
    rows, cols = value.shape
    count = len(order)
    sizes = (rows * count, cols) if dim == 0 else (rows, count * cols)
    parts = native.allocator(value)(sizes, (sizes[1], 1), torch.bfloat16)
    native.module("cuda").split_bf16(
        native.place(value), value=value.data_ptr(), parts=parts.data_ptr(), rows=rows, cols=cols,
        part_stride=rows * cols if dim == 0 else cols, row_stride=sizes[1], count=count,
        order=sum(piece << 2 * part for part, piece in enumerate(order)),
    )  # fmt: skip
    return parts


def _sum(parts: Tensor, dim: int) -> Tensor:
    rows, cols = parts.shape
    sizes = (rows // _PIECES, cols) if dim == 0 else (rows, cols // _PIECES)
    total = native.allocator(parts)(sizes, (sizes[1], 1), torch.float32)
    native.module("cuda").sum_parts(
        native.place(parts), parts=parts.data_ptr(), sum=total.data_ptr(), rows=sizes[0], cols=sizes[1],
        part_stride=sizes[0] * cols if dim == 0 else sizes[1], row_stride=cols,
    )  # fmt: skip
    return total


def _use_native(value: Tensor) -> bool:
    """On a CPU the torch form is all there is."""
    return value.is_cuda and is_plain(value) and native.use_native("ops.split_bf16", "auto", "cuda")


# ---- public ----------------------------------------------------------------------------------------------
def split_bf16(value: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """bf16 pieces of an fp32 matrix, one behind the other along a dimension.

    Args:
        value: fp32 (R, C).
        order: which piece stands where, of 0, the largest, 1 and 2; up to four.
        dim: 0, for (n R, C), or 1, for (R, n C).

    Raises:
        ValueError: another dtype, shape, order or dimension.
    """
    if value.dtype != torch.float32 or value.dim() != 2 or dim not in (0, 1):
        raise ValueError(
            f"ops.split_bf16: value must be an fp32 matrix and dim 0 or 1, got {value.dtype}, "
            f"shape={tuple(value.shape)}, dim={dim}"
        )
    if not 1 <= len(order) <= 4 or any(piece not in range(_PIECES) for piece in order):
        raise ValueError(f"ops.split_bf16: order must be one to four of 0, 1, 2, got order={tuple(order)}")
    return _split(value, order, dim) if _use_native(value) else _split_reference(value, order, dim)


def sum_parts(parts: Tensor, dim: int) -> Tensor:
    """The sum of the three equal parts that a contiguous fp32 matrix has along a dimension, the first two first."""
    if parts.dtype != torch.float32 or parts.dim() != 2 or dim not in (0, 1) or parts.shape[dim] % _PIECES:
        raise ValueError(
            f"ops.sum_parts: parts must be an fp32 matrix of {_PIECES} parts along dim, got {parts.dtype}, "
            f"shape={tuple(parts.shape)}, dim={dim}"
        )
    return _sum(parts, dim) if _use_native(parts) and parts.is_contiguous() else _sum_reference(parts, dim)
