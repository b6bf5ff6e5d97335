"""`expert_ffn`, differentiable: what is saved for backward, and in which memory backward writes.

Legend: N rows, E experts, D d_model, F hidden size, G = 2F for SwiGLU (gate, then up) or F for GELU, T tokens, K top_k.

Expert e owns rows [offsets[e], offsets[e + 1]). Rows from offsets[E] on belong to dropped slots: they are not read, and
what is returned there is undefined. An expert without rows gets weight gradients of exactly 0.

Saved for backward: the rows (N, D), or the tokens (T, D) that they are gathered from again, and the hidden rows before
the activation (N, G). The activation is recomputed, and with the combine weights folded in, the outputs (N, D) are not
saved either. Where rows are gathered again, the gradient of the hidden rows is written over these, and the rows, then
their gradient, over the outputs' gradient: one tensor of (N, D) at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops.buffer import Segment
from moe_lightning.ops.expert_ffn import kernels
from moe_lightning.ops.expert_ffn.kernels import ACTIVATIONS, Added, GradientMemory
from moe_lightning.ops.index import RoutingIndex
from moe_lightning.ops.library import check_same_device
from moe_lightning.ops.permute import Gathered
from moe_lightning.utils.checks import check_choice

#: Segments: where gradients of the weights are written.
WeightGrads = tuple[Segment, Segment] | Added
Pair = tuple[Tensor, Tensor]


class RowWeights(NamedTuple):
    """The combine weight of row r is ``weights_TK.view(-1)[perm_N[r]]``."""

    weights_TK: Tensor
    """fp32 (fp64 for fp64 rows)."""
    perm_N: Tensor
    """int32, sorted row -> slot, of the routing index."""
    gathered: Gathered | None = None
    """What the rows were gathered from, to save that in their place. Backward gathers them again; unless the graph is
    retained, in the memory of the outputs' gradient, which nothing else may read."""


# ---- autograd --------------------------------------------------------------------------------------------
#: Whether backward was asked to `retain_graph`.
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        up_EGD: Tensor,
        down_EDF: Tensor,
        weights_TK: Tensor | None,
        expert_offsets: Tensor,
        perm_N: Tensor | None,
        gathered: Gathered | None,
        activation: str,
        given: tuple[Tensor | None, WeightGrads | None, Pair | None],
        sm_margin: int,
    ) -> Tensor:
        ctx.buffer_ND, ctx.weight_grads, copies = given
        ctx.fp32_weight_grads = up_EGD.dtype != rows_ND.dtype
        up_EGD, down_EDF = copies or (up_EGD.to(rows_ND.dtype), down_EDF.to(rows_ND.dtype))
        arguments = rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N
        out_ND, hidden_NG = kernels.forward(*arguments, activation, True, sm_margin, ctx.buffer_ND)
        if gathered is None:
            ctx.save_for_backward(*arguments, hidden_NG)
        else:
            ctx.save_for_backward(gathered.x_TD.detach(), *arguments[1:], hidden_NG, *gathered.routing_index)
        ctx.top_k = gathered and gathered.top_k
        ctx.activation, ctx.sm_margin = activation, sm_margin
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N, hidden_NG, *index = ctx.saved_tensors
        reused = None  # memory that nothing reads again
        if ctx.top_k is not None:
            rows_ND = Gathered(rows_ND, RoutingIndex(*index), ctx.top_k)
            reused = None if torch.compiler.is_compiling() or _keeps_graph() else hidden_NG
        needs_rows, needs_up, needs_down, needs_weights = ctx.needs_input_grad[:4]
        memory, adds = GradientMemory(ctx.buffer_ND, hidden=reused), isinstance(ctx.weight_grads, Added)
        if adds:
            memory = memory._replace(up=ctx.weight_grads.up, down=ctx.weight_grads.down, accumulate=True)
        elif ctx.weight_grads is not None:
            up_segment, down_segment = ctx.weight_grads
            up = up_segment.take(up_EGD) if needs_up else None
            memory = memory._replace(up=up, down=down_segment.take(down_EDF) if needs_down else None)
        gradients = kernels.backward(
            grad_out_ND, rows_ND, up_EGD, down_EDF, hidden_NG, expert_offsets, weights_TK, perm_N,
            ctx.activation, ctx.fp32_weight_grads, needs_rows, needs_up, needs_down, ctx.sm_margin, memory,
        )  # fmt: skip
        returned = needs_rows, needs_up and not adds, needs_down and not adds, needs_weights
        return *(g if wants else None for g, wants in zip(gradients, returned, strict=True)), *[None] * 6


# ---- public ----------------------------------------------------------------------------------------------
def expert_ffn(
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_offsets: Tensor,
    activation: str = "swiglu",
    row_weights: RowWeights | None = None,
    out: Tensor | None = None,
    weight_grads: WeightGrads | None = None,
    sm_margin: int = 0,
    copies: Pair | None = None,
) -> Tensor:
    """Each row through its expert's feed-forward network (SwiGLU: arXiv:2002.05202), (N, D).

    Native on a GPU where `missing` returns None; elsewhere the torch reference, which reads the offsets on the host.

    Args:
        rows_ND: sorted by expert.
        up_EGD: E matrices (G, D), of the dtype of the rows; or fp32 for fp16 and bf16 rows: they are cast for the
            products, and their gradients are the fp32 sums themselves.
        down_EDF: E matrices (D, F), likewise.
        expert_offsets: int32 (E + 1), as in :class:`moe_lightning.ops.RoutingIndex`.
        activation: "swiglu" or "gelu" (the exact one).
        row_weights: scale each row by its combine weight: the token's output is then a plain sum of its rows. With
            `gathered` the rows are not saved for backward.
        out: like the rows: where the outputs are written, and in backward the gradient of the rows.
        weight_grads: where the gradients of up and down are written, or to what those of fp32 weights are added; None
            for new tensors.
        sm_margin: multiprocessors that the kernels, in backward too, leave to kernels of other streams.
        copies: of fp32 weights, in the dtype of the rows; None: they are made here.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, or a negative margin.
    """
    weights_TK, perm_N, gathered = row_weights or (None, None, None)
    check_choice("ops.expert_ffn", "activation", activation, ACTIVATIONS)
    _check_shapes(rows_ND, up_EGD, down_EDF, expert_offsets, activation, weights_TK)
    _check_dtypes(rows_ND, up_EGD, down_EDF, fp32_options=copies is not None or isinstance(weight_grads, Added))
    if sm_margin < 0:
        raise ValueError(f"ops.expert_ffn: sm_margin must not be negative, got sm_margin={sm_margin}; 0 leaves none")
    check_same_device(
        "ops.expert_ffn", rows=rows_ND, up=up_EGD, down=down_EDF, expert_offsets=expert_offsets,
        row_weights=weights_TK, perm=perm_N, out=out,
    )  # fmt: skip
    if out is not None and (out.shape, out.dtype) != (rows_ND.shape, rows_ND.dtype):
        raise ValueError(
            f"ops.expert_ffn: out must be like the rows, got {tuple(out.shape)} of {out.dtype} for "
            f"{tuple(rows_ND.shape)} of {rows_ND.dtype}"
        )
    tensors = rows_ND, up_EGD, down_EDF, weights_TK
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        # In a tuple autograd does not take `out` for an input.
        given = out, weight_grads, copies
        return _ExpertFfn.apply(*tensors, expert_offsets, perm_N, gathered, activation, given, sm_margin)
    up_EGD, down_EDF = copies or (up_EGD.to(rows_ND.dtype), down_EDF.to(rows_ND.dtype))
    arguments = rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N
    return kernels.forward(*arguments, activation, False, sm_margin, out)[0]


def _check_shapes(
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_offsets: Tensor,
    activation: str,
    weights_TK: Tensor | None,
) -> None:
    experts, d_model, hidden_dim = down_EDF.shape
    width = 2 * hidden_dim if activation == "swiglu" else hidden_dim
    fits = up_EGD.shape == (experts, width, d_model) and expert_offsets.shape == (experts + 1,)
    if not fits or rows_ND.dim() != 2 or rows_ND.shape[1] != d_model:
        raise ValueError(
            "ops.expert_ffn: rows (N, D), up (E, G, D), down (E, D, F) and offsets (E + 1) must fit, got "
            f"{tuple(rows_ND.shape)}, {tuple(up_EGD.shape)}, {tuple(down_EDF.shape)}, {tuple(expert_offsets.shape)} "
            f"with {activation}"
        )
    if weights_TK is not None and weights_TK.numel() != rows_ND.shape[0]:
        raise ValueError(
            f"ops.expert_ffn: row_weights must hold a weight per row, got {tuple(weights_TK.shape)} for "
            f"{rows_ND.shape[0]} rows"
        )


def _check_dtypes(rows_ND: Tensor, up_EGD: Tensor, down_EDF: Tensor, fp32_options: bool) -> None:
    """`fp32_options`: whether any is given that is of fp32 weights alone."""
    wide = rows_ND.dtype in kernels.DTYPES and up_EGD.dtype == torch.float32
    if up_EGD.dtype != down_EDF.dtype or not (wide or up_EGD.dtype == rows_ND.dtype):
        raise ValueError(
            f"ops.expert_ffn: rows and weights must have one dtype, or weights fp32 for fp16 and bf16 rows, got "
            f"{rows_ND.dtype}, {up_EGD.dtype}, {down_EDF.dtype}; cast with .to(rows.dtype)"
        )
    if fp32_options and not wide:
        raise ValueError(
            f"ops.expert_ffn: copies and gradients to add to are of fp32 weights, got {up_EGD.dtype} for rows of "
            f"{rows_ND.dtype}; leave them out"
        )
