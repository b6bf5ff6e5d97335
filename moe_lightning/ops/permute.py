"""Local movement of rows: into expert order, and back as a weighted sum.

Shapes: T tokens, D width, K = top_k, N = T * K slots. Nothing is added atomically: the bits are the same on every
run. Sums are taken in fp32 for half types. Native on CUDA; on the CPU torch's gathers are as fast as anything.

The four ops are opaque to torch.compile: torch 2.11 traces an ``autograd.Function`` over plain torch code into
wrong gradients.

``may_drop`` says that the index may hold dropped slots: these then give exactly 0, in the forward and in every
gradient, even where their rows hold garbage. Without it the masks are not paid for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops import native
from moe_lightning.ops.index import RoutingIndex
from moe_lightning.ops.library import accum_dtype, check_same_device, register


# ---- torch reference, and the CPU's implementation -------------------------------------------------------
def _tokens(perm_N: Tensor, top_k: int) -> Tensor:
    return perm_N if top_k == 1 else torch.div(perm_N, top_k, rounding_mode="floor")


def _dropped_slots(expert_offsets: Tensor, inverse_perm_N: Tensor, top_k: int) -> Tensor:
    """(T, K, 1): slots whose row is after the last expert's."""
    return (inverse_perm_N >= expert_offsets[-1]).view(-1, top_k, 1)


def _permute_reference(x_TD: Tensor, perm_N: Tensor, inverse_perm_N: Tensor, top_k: int) -> Tensor:
    """Rows (N, D) in expert order."""
    return x_TD.index_select(0, _tokens(perm_N, top_k))


def _permute_backward_reference(
    grad_ND: Tensor, expert_offsets: Tensor, inverse_perm_N: Tensor, top_k: int, may_drop: bool
) -> Tensor:
    """Sums over the slots of a token."""
    slots_TKD = grad_ND.index_select(0, inverse_perm_N).view(-1, top_k, grad_ND.shape[1])
    if may_drop:
        slots_TKD = slots_TKD.masked_fill(_dropped_slots(expert_offsets, inverse_perm_N, top_k), 0)
    return slots_TKD.sum(1, dtype=accum_dtype(grad_ND.dtype)).to(grad_ND.dtype)


def _unpermute_reference(
    rows_ND: Tensor, weights_TK: Tensor, expert_offsets: Tensor, inverse_perm_N: Tensor, may_drop: bool
) -> Tensor:
    """Weighted sums over the slots of a token."""
    top_k = weights_TK.shape[1]
    slots_TKD = rows_ND.index_select(0, inverse_perm_N).view(-1, top_k, rows_ND.shape[1])
    weighted_TKD = slots_TKD * weights_TK.to(accum_dtype(rows_ND.dtype))[:, :, None]
    if may_drop:
        weighted_TKD = weighted_TKD.masked_fill(_dropped_slots(expert_offsets, inverse_perm_N, top_k), 0)
    return weighted_TKD.sum(1).to(rows_ND.dtype)


def _unpermute_backward_reference(
    grad_TD: Tensor,
    rows_ND: Tensor,
    weights_TK: Tensor,
    expert_offsets: Tensor,
    perm_N: Tensor,
    inverse_perm_N: Tensor,
    may_drop: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of weights."""
    top_k, wide = weights_TK.shape[1], accum_dtype(rows_ND.dtype)
    grad_slots_ND = grad_TD.index_select(0, _tokens(perm_N, top_k))  # grad of y, in row order
    weights_N = weights_TK.reshape(-1).to(wide).index_select(0, perm_N)
    grad_rows_ND = (grad_slots_ND * weights_N[:, None]).to(rows_ND.dtype)
    dots_N = (grad_slots_ND.to(wide) * rows_ND).sum(1)
    grad_weights_TK = dots_N.index_select(0, inverse_perm_N).view(-1, top_k).to(weights_TK.dtype)
    if may_drop:
        rows_N = torch.arange(perm_N.shape[0], device=perm_N.device)
        grad_rows_ND = grad_rows_ND.masked_fill((rows_N >= expert_offsets[-1])[:, None], 0)
        dropped_TK = _dropped_slots(expert_offsets, inverse_perm_N, top_k)[:, :, 0]
        grad_weights_TK = grad_weights_TK.masked_fill(dropped_TK, 0)
    return grad_rows_ND, grad_weights_TK


# ---- native call -----------------------------------------------------------------------------------------
def _is_native(rows: Tensor) -> bool:
    return rows.dtype in native.DTYPE_CODES and native.use_native("ops.permute", "auto", "cuda")


def _kept_rows(expert_offsets: Tensor, may_drop: bool) -> int:
    """Address of the number of rows that were not dropped; 0 when none can be."""
    last = (expert_offsets.numel() - 1) * expert_offsets.element_size()
    return expert_offsets.data_ptr() + last if may_drop else 0


def _permute_cuda(
    x_TD: Tensor, perm_N: Tensor, inverse_perm_N: Tensor, top_k: int, into: Tensor | None = None
) -> Tensor:
    if not _is_native(x_TD):
        return _permute_reference(x_TD, perm_N, inverse_perm_N, top_k)
    x_TD = x_TD.contiguous()
    tokens, width = x_TD.shape
    rows_ND = x_TD.new_empty((tokens * top_k, width)) if into is None else into
    native.module("cuda").permute(
        native.place(x_TD), x=x_TD.data_ptr(), second_x=0, first_tokens=tokens, inverse_perm=inverse_perm_N.data_ptr(),
        rows=rows_ND.data_ptr(), tokens=tokens, width=width, top_k=top_k, dtype=native.DTYPE_CODES[x_TD.dtype],
    )  # fmt: skip
    return rows_ND


def _gather_sum(
    rows_ND: Tensor,
    weights_TK: Tensor | None,
    expert_offsets: Tensor,
    inverse_perm_N: Tensor,
    top_k: int,
    may_drop: bool,
) -> Tensor:
    rows_ND = rows_ND.contiguous()
    tokens, width = inverse_perm_N.shape[0] // top_k, rows_ND.shape[1]
    y_TD = rows_ND.new_empty((tokens, width))
    native.module("cuda").unpermute(
        native.place(rows_ND), rows=rows_ND.data_ptr(), weights=native.pointer(weights_TK),
        inverse_perm=inverse_perm_N.data_ptr(), kept_rows=_kept_rows(expert_offsets, may_drop), y=y_TD.data_ptr(),
        tokens=tokens, width=width, top_k=top_k, dtype=native.DTYPE_CODES[rows_ND.dtype],
    )  # fmt: skip
    return y_TD


def _permute_backward_cuda(
    grad_ND: Tensor, expert_offsets: Tensor, inverse_perm_N: Tensor, top_k: int, may_drop: bool
) -> Tensor:
    if not _is_native(grad_ND):
        return _permute_backward_reference(grad_ND, expert_offsets, inverse_perm_N, top_k, may_drop)
    return _gather_sum(grad_ND, None, expert_offsets, inverse_perm_N, top_k, may_drop)


def _unpermute_cuda(
    rows_ND: Tensor, weights_TK: Tensor, expert_offsets: Tensor, inverse_perm_N: Tensor, may_drop: bool
) -> Tensor:
    if not _is_native(rows_ND):
        return _unpermute_reference(rows_ND, weights_TK, expert_offsets, inverse_perm_N, may_drop)
    wide_TK = weights_TK.to(accum_dtype(rows_ND.dtype)).contiguous()
    return _gather_sum(rows_ND, wide_TK, expert_offsets, inverse_perm_N, weights_TK.shape[1], may_drop)


def _unpermute_backward_cuda(
    grad_TD: Tensor,
    rows_ND: Tensor,
    weights_TK: Tensor,
    expert_offsets: Tensor,
    perm_N: Tensor,
    inverse_perm_N: Tensor,
    may_drop: bool,
) -> tuple[Tensor, Tensor]:
    if not _is_native(rows_ND):
        return _unpermute_backward_reference(
            grad_TD, rows_ND, weights_TK, expert_offsets, perm_N, inverse_perm_N, may_drop
        )
    grad_TD, rows_ND = grad_TD.contiguous(), rows_ND.contiguous()
    wide_TK = weights_TK.to(accum_dtype(rows_ND.dtype)).contiguous()
    grad_rows_ND, grad_weights_TK = rows_ND.new_empty(rows_ND.shape), wide_TK.new_empty(wide_TK.shape)
    native.module("cuda").unpermute_backward(
        native.place(rows_ND), grad_y=grad_TD.data_ptr(), rows=rows_ND.data_ptr(), weights=wide_TK.data_ptr(),
        inverse_perm=inverse_perm_N.data_ptr(), kept_rows=_kept_rows(expert_offsets, may_drop),
        grad_rows=grad_rows_ND.data_ptr(), grad_weights=grad_weights_TK.data_ptr(), tokens=grad_TD.shape[0],
        width=grad_TD.shape[1], top_k=weights_TK.shape[1], dtype=native.DTYPE_CODES[rows_ND.dtype],
    )  # fmt: skip
    return grad_rows_ND, grad_weights_TK.to(weights_TK.dtype)


# ---- fake and registration -------------------------------------------------------------------------------
_permute_op = register(
    "permute(Tensor x_TD, Tensor perm_N, Tensor inverse_perm_N, int top_k) -> Tensor",
    _permute_reference,
    lambda x_TD, perm_N, inverse_perm_N, top_k: x_TD.new_empty((perm_N.shape[0], x_TD.shape[1])),
    _permute_cuda,
)
_permute_backward_op = register(
    "permute_backward("
    "Tensor grad_ND, Tensor expert_offsets, Tensor inverse_perm_N, int top_k, bool may_drop) -> Tensor",
    _permute_backward_reference,
    lambda grad_ND, expert_offsets, inverse_perm_N, top_k, may_drop: grad_ND.new_empty(
        (inverse_perm_N.shape[0] // top_k, grad_ND.shape[1])
    ),
    _permute_backward_cuda,
)
_unpermute_op = register(
    "unpermute("
    "Tensor rows_ND, Tensor weights_TK, Tensor expert_offsets, Tensor inverse_perm_N, bool may_drop) -> Tensor",
    _unpermute_reference,
    lambda rows_ND, weights_TK, *_: rows_ND.new_empty((weights_TK.shape[0], rows_ND.shape[1])),
    _unpermute_cuda,
)
_unpermute_backward_op = register(
    "unpermute_backward("
    "Tensor grad_TD, Tensor rows_ND, Tensor weights_TK, Tensor expert_offsets, Tensor perm_N, Tensor inverse_perm_N, "
    "bool may_drop) -> (Tensor, Tensor)",
    _unpermute_backward_reference,
    lambda grad_TD, rows_ND, weights_TK, *_: (
        rows_ND.new_empty(rows_ND.shape),
        weights_TK.new_empty(weights_TK.shape),
    ),
    _unpermute_backward_cuda,
)


# ---- autograd --------------------------------------------------------------------------------------------
class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, offsets: Tensor, perm_N: Tensor, inverse_N: Tensor, top_k: int, may_drop: bool
    ) -> Tensor:
        ctx.save_for_backward(offsets, inverse_N)
        ctx.top_k, ctx.may_drop = top_k, may_drop
        return _permute_op(x_TD, perm_N, inverse_N, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD = _permute_backward_op(grad_ND, *ctx.saved_tensors, ctx.top_k, ctx.may_drop)
        return grad_TD, None, None, None, None, None


class _SumRows(torch.autograd.Function):
    """What `_Permute` is, the other way round."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, offsets: Tensor, perm_N: Tensor, inverse_N: Tensor, top_k: int, may_drop: bool
    ) -> Tensor:
        ctx.save_for_backward(perm_N, inverse_N)
        ctx.top_k = top_k
        return _permute_backward_op(rows_ND, offsets, inverse_N, top_k, may_drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return _permute_op(grad_TD, *ctx.saved_tensors, ctx.top_k), None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weights_TK: Tensor,
        offsets: Tensor,
        perm_N: Tensor,
        inverse_N: Tensor,
        may_drop: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK, offsets, perm_N, inverse_N)
        ctx.may_drop = may_drop
        return _unpermute_op(rows_ND, weights_TK, offsets, inverse_N, may_drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows_ND, grad_weights_TK = _unpermute_backward_op(grad_TD, *ctx.saved_tensors, ctx.may_drop)
        return grad_rows_ND, grad_weights_TK, None, None, None, None


# ---- public ----------------------------------------------------------------------------------------------
def permute(x_TD: Tensor, index: RoutingIndex, top_k: int, may_drop: bool = False) -> Tensor:
    """Gather tokens into expert order: ``rows_ND[r] = x_TD[perm_N[r] // top_k]``.

    Rows of dropped slots are after the last expert's and hold their token as well.

    Raises:
        ValueError: x is not (T, D) with T * top_k slots in the index, or the devices differ.
    """
    if x_TD.dim() != 2 or x_TD.shape[0] * top_k != index.perm_N.shape[0]:
        raise ValueError(
            "ops.permute: x must have shape (tokens, width) with tokens * top_k slots in the index, "
            f"got {tuple(x_TD.shape)}, top_k={top_k}, slots={index.perm_N.shape[0]}"
        )
    check_same_device("ops.permute", x=x_TD, index=index.perm_N)
    return _Permute.apply(x_TD, *index, top_k, may_drop)


class Gathered(NamedTuple):
    """What rows in expert order were gathered from: backward may keep this in their place, and gather again."""

    x_TD: Tensor
    routing_index: RoutingIndex
    top_k: int

    def rows(self, into: Tensor | None = None) -> Tensor:
        """(N, D), as of `permute`, in memory on a GPU that is given for them; no gradient goes through them."""
        _, perm_N, inverse_perm_N = self.routing_index
        arguments = self.x_TD, perm_N, inverse_perm_N, self.top_k
        return _permute_op(*arguments) if into is None else _permute_cuda(*arguments, into)


def unpermute(rows_ND: Tensor, weights_TK: Tensor, index: RoutingIndex, may_drop: bool = False) -> Tensor:
    """Bring rows back: ``y_TD[t] = sum_k weights_TK[t, k] * rows_ND[inverse_perm_N[t * K + k]]``.

    The sum is taken in fp32 (fp64 for fp64 rows) and returned in the dtype of the rows.

    Raises:
        ValueError: rows are not (N, D), or weights not (T, K), for the N slots of the index, or the devices differ.
    """
    slots = index.perm_N.shape[0]
    shapes_fit = rows_ND.shape[0] == slots and weights_TK.numel() == slots
    if rows_ND.dim() != 2 or weights_TK.dim() != 2 or not shapes_fit:
        raise ValueError(
            "ops.unpermute: rows must have shape (slots, width) and weights (tokens, top_k), "
            f"got {tuple(rows_ND.shape)}, {tuple(weights_TK.shape)}, slots={slots}"
        )
    check_same_device("ops.unpermute", rows=rows_ND, weights=weights_TK, index=index.perm_N)
    return _Unpermute.apply(rows_ND, weights_TK, *index, may_drop)


def sum_rows(rows_ND: Tensor, index: RoutingIndex, top_k: int, may_drop: bool = False) -> Tensor:
    """Bring rows back that carry their weights already: ``y_TD[t] = sum_k rows_ND[inverse_perm_N[t * K + k]]``.

    Raises:
        ValueError: rows are not (N, D) for the N slots of the index, or the devices differ.
    """
    slots = index.perm_N.shape[0]
    if rows_ND.dim() != 2 or rows_ND.shape[0] != slots or slots % top_k:
        raise ValueError(
            "ops.sum_rows: rows must have shape (slots, width), slots a multiple of top_k, "
            f"got {tuple(rows_ND.shape)}, slots={slots}, top_k={top_k}"
        )
    check_same_device("ops.sum_rows", rows=rows_ND, index=index.perm_N)
    return _SumRows.apply(rows_ND, *index, top_k, may_drop)
