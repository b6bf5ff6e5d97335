"""The experts' feed-forward network over rows sorted by expert, ``down(act(up(x)))``, forward and backward.

Legend: N rows, E experts, D d_model, F hidden size, G = 2F for SwiGLU (gate, then up) or F for GELU, T tokens, K top_k.

Expert e owns rows [offsets[e], offsets[e + 1]). Rows from offsets[E] on belong to dropped slots: they are not read, and
what is returned there is undefined. An expert without rows gets weight gradients of exactly 0. Sums are fp32 (fp64 for
fp64). Native on CUDA in fp16 and bf16, by CUTLASS's building blocks, and never waiting for the device: the activation
and the combine weight are part of the first product, their gradients part of the first product of backward.

Saved for backward: the rows (N, D), or the tokens (T, D) that they are gathered from again, and the hidden rows before
the activation (N, G). The activation is recomputed, and with the combine weights folded in, the outputs (N, D) are not
kept either. Of gathered rows, the gradient of the hidden rows is written over these, and rows and their gradient over
that of the outputs: one tensor of (N, D) at a time.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from moe_lightning.ops import expert_ffn_reference as reference
from moe_lightning.ops import native
from moe_lightning.ops.buffer import Segment
from moe_lightning.ops.index import RoutingIndex
from moe_lightning.ops.library import check_same_device, is_plain, register
from moe_lightning.ops.permute import Gathered
from moe_lightning.utils.checks import check_choice

ACTIVATIONS = ("swiglu", "gelu")
"""In the order of their codes in ``kernels/include/grouped_ffn.h``."""
_DTYPES = (torch.float16, torch.bfloat16)


class Added(NamedTuple):
    """fp32 gradients of up and down, to which those of a backward pass are added; it returns none of them."""

    up: Tensor
    down: Tensor


#: Segments: where gradients of the weights are written.
WeightGrads = tuple[Segment, Segment] | Added
Pair = tuple[Tensor, Tensor]


class Memory(NamedTuple):
    """Where gradients are written; None for new tensors."""

    rows: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    hidden: Tensor | None = None
    adds: bool = False
    """Whether those of up and down, which are fp32, are added to what is there."""


class RowWeights(NamedTuple):
    """The combine weight of row r is ``weights_TK.view(-1)[perm_N[r]]``."""

    weights_TK: Tensor
    """fp32 (fp64 for fp64 rows)."""
    perm_N: Tensor
    """int32, sorted row -> slot, of the routing index."""
    gathered: Gathered | None = None
    """Of what the rows were gathered, to keep that in their place. Backward gathers them again; unless the graph is
    retained, in the memory of the outputs' gradient, which nothing else may read."""


@torch.compiler.assume_constant_result
def missing(dtype: torch.dtype, device: torch.device, d_model: int, hidden_dim: int) -> str | None:
    """Why the kernels cannot take this case and what to do about it; None when they can."""
    if device.type != "cuda":
        return f"the expert kernels run on a GPU, got device={device.type}"
    if reason := native.missing("cuda"):
        return reason
    if not native.module("cuda").CUTLASS:
        return (
            "the CUDA kernels are built without CUTLASS; run `pip install -e .` where pip can download it, or add "
            "`-C cmake.define.MOE_CUTLASS=FOLDER`"
        )
    if dtype not in _DTYPES:
        return f"the expert kernels take fp16 and bf16, got {dtype}; use --trainer.precision bf16-mixed"
    if d_model % 8 or hidden_dim % 8:
        return f"d_model and hidden_dim must be multiples of 8, got d_model={d_model}, hidden_dim={hidden_dim}"
    capability = _capability(device)
    if capability < (8, 0):
        return f"the expert kernels need compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    return None


#: Asked of every layer, and of each chunk of its rows.
_capability = functools.cache(torch.cuda.get_device_capability)


# ---- fake ------------------------------------------------------------------------------------------------
def _empty_outputs(
    rows_ND: Tensor,
    up_EGD: Tensor,
    _down: Tensor,
    _offsets: Tensor,
    _weights: Any,
    _perm: Any,
    _activation: str,
    keep_hidden: bool,
    _sm_margin: int,
    buffer_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, in the buffer where there is one, and hidden rows; not computed."""
    kept = rows_ND.shape[0] if keep_hidden else 0
    out_ND = rows_ND.new_empty(rows_ND.shape) if buffer_ND is None else buffer_ND
    return out_ND, rows_ND.new_empty((kept, up_EGD.shape[1]))


def _empty_gradients(
    _grad: Tensor,
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    _hidden: Tensor,
    _offsets: Tensor,
    weights_TK: Tensor | None,
    _perm: Any,
    _activation: str,
    fp32_weight_grads: bool,
    needs_rows: bool,
    needs_up: bool,
    needs_down: bool,
    _sm_margin: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, up, down and weights; not computed."""
    return (
        _empty_gradient(rows_ND, needs_rows),
        _empty_gradient(up_EGD, needs_up, fp32=fp32_weight_grads),
        _empty_gradient(down_EDF, needs_down, fp32=fp32_weight_grads),
        rows_ND.new_empty(0) if weights_TK is None else weights_TK.new_empty(weights_TK.shape),
    )


def _empty_gradient(like: Tensor, needed: bool, memory: Tensor | None = None, fp32: bool = False) -> Tensor:
    """In the memory where there is some."""
    if needed and memory is not None:
        return memory
    return like.new_empty(like.shape if needed else 0, dtype=torch.float32 if fp32 else None)


# ---- native call -----------------------------------------------------------------------------------------
def _shape(rows_ND: Tensor, down_EDF: Tensor, activation: str, sm_margin: int) -> dict[str, int]:
    """The fields of ``FfnShape`` in ``kernels/include/grouped_ffn.h``."""
    experts, d_model, hidden_dim = down_EDF.shape
    return {
        "num_rows": rows_ND.shape[0], "d_model": d_model, "hidden_dim": hidden_dim, "experts": experts,
        "activation": ACTIVATIONS.index(activation), "dtype": native.DTYPE_CODES[rows_ND.dtype],
        "sm_margin": sm_margin,
    }  # fmt: skip


def _forward_cuda(
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_offsets: Tensor,
    weights_TK: Tensor | None,
    perm_N: Tensor | None,
    activation: str,
    keep_hidden: bool,
    sm_margin: int,
    buffer_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if missing(rows_ND.dtype, rows_ND.device, down_EDF.shape[1], down_EDF.shape[2]):
        return reference.forward(
            rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N, activation, keep_hidden, sm_margin
        )
    kernels = native.module("cuda")
    rows_ND, up_EGD, down_EDF = rows_ND.contiguous(), up_EGD.contiguous(), down_EDF.contiguous()
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    out_ND, hidden_NG = _empty_outputs(
        rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N, activation, keep_hidden, sm_margin, buffer_ND
    )
    h_NF = rows_ND.new_empty((rows_ND.shape[0], down_EDF.shape[2]))
    place, offsets = native.place(rows_ND), expert_offsets.data_ptr()
    shape = _shape(rows_ND, down_EDF, activation, sm_margin)
    kernels.ffn_up(
        place, shape, rows=rows_ND.data_ptr(), up=up_EGD.data_ptr(), expert_offsets=offsets,
        weights=native.pointer(weights_TK), slot_of_row=native.pointer(perm_N),
        hidden=hidden_NG.data_ptr() if keep_hidden else 0, h=h_NF.data_ptr(),
    )  # fmt: skip
    kernels.ffn_down(
        place, shape, h=h_NF.data_ptr(), down=down_EDF.data_ptr(), expert_offsets=offsets, out=out_ND.data_ptr()
    )
    return out_ND, hidden_NG


def _backward_cuda(
    grad_out_ND: Tensor,
    rows_ND: Tensor | Gathered,
    up_EGD: Tensor,
    down_EDF: Tensor,
    hidden_NG: Tensor,
    expert_offsets: Tensor,
    weights_TK: Tensor | None,
    perm_N: Tensor | None,
    activation: str,
    fp32_weight_grads: bool,
    needs_rows: bool,
    needs_up: bool,
    needs_down: bool,
    sm_margin: int,
    memory: Memory = Memory(),  # noqa: B008  it is immutable
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows that are gathered, in as little memory as can be: each tensor is made when it is needed first."""
    if missing(grad_out_ND.dtype, grad_out_ND.device, down_EDF.shape[1], down_EDF.shape[2]):
        rows_ND = rows_ND.rows() if isinstance(rows_ND, Gathered) else rows_ND
        return reference.backward(
            grad_out_ND, rows_ND, up_EGD, down_EDF, hidden_NG, expert_offsets, weights_TK, perm_N, activation,
            fp32_weight_grads, needs_rows, needs_up, needs_down, sm_margin,
        )  # fmt: skip
    kernels = native.module("cuda")
    grad_out_ND, up_EGD, down_EDF = grad_out_ND.contiguous(), up_EGD.contiguous(), down_EDF.contiguous()
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    place, offsets = native.place(grad_out_ND), expert_offsets.data_ptr()
    shape = _shape(grad_out_ND, down_EDF, activation, sm_margin)
    of_weights: dict[str, Any] = {name: shape[name] for name in ("num_rows", "experts", "dtype", "sm_margin")}
    of_weights |= {"fp32": fp32_weight_grads, "accumulate": memory.adds}
    weighted = weights_TK is not None
    grad_weights_TK = grad_out_ND.new_empty(0) if weights_TK is None else torch.empty_like(weights_TK)
    partials = grad_weights_TK.new_empty(
        kernels.ffn_workspace(shape["num_rows"], shape["hidden_dim"]) if weighted else 0, dtype=torch.float32
    )
    grad_hidden_NG = _empty_gradient(hidden_NG, True, memory.hidden)
    h_NF = grad_out_ND.new_empty((shape["num_rows"], shape["hidden_dim"]))
    kernels.ffn_down_backward(
        place, shape, grad_out=grad_out_ND.data_ptr(), down=down_EDF.data_ptr(), hidden=hidden_NG.data_ptr(),
        expert_offsets=offsets, weights=native.pointer(weights_TK), slot_of_row=native.pointer(perm_N),
        grad_hidden=grad_hidden_NG.data_ptr(), h=h_NF.data_ptr(),
        grad_weights=grad_weights_TK.data_ptr() if weighted else 0, workspace=partials.data_ptr() if weighted else 0,
    )  # fmt: skip
    grad_down_EDF = _empty_gradient(down_EDF, needs_down, memory.down, fp32_weight_grads)
    if needs_down:
        kernels.ffn_weight_backward(
            place, of_weights, grad=grad_out_ND.data_ptr(), input=h_NF.data_ptr(), expert_offsets=offsets,
            grad_weight=grad_down_EDF.data_ptr(), outputs=shape["d_model"], inputs=shape["hidden_dim"],
        )  # fmt: skip
    del h_NF
    into = memory.rows
    if isinstance(rows_ND, Gathered):
        reused = None if memory.hidden is None else grad_out_ND
        rows_ND = into = rows_ND.rows(reused) if needs_up else _empty_gradient(grad_out_ND, True, reused)
    grad_up_EGD = _empty_gradient(up_EGD, needs_up, memory.up, fp32_weight_grads)
    if needs_up:
        rows_ND = rows_ND.contiguous()
        kernels.ffn_weight_backward(
            place, of_weights, grad=grad_hidden_NG.data_ptr(), input=rows_ND.data_ptr(), expert_offsets=offsets,
            grad_weight=grad_up_EGD.data_ptr(), outputs=up_EGD.shape[1], inputs=shape["d_model"],
        )  # fmt: skip
    grad_rows_ND = _empty_gradient(rows_ND, needs_rows, into)
    if needs_rows:
        kernels.ffn_up_backward(
            place, shape, grad_hidden=grad_hidden_NG.data_ptr(), up=up_EGD.data_ptr(), expert_offsets=offsets,
            grad_rows=grad_rows_ND.data_ptr(),
        )  # fmt: skip
    return grad_rows_ND, grad_up_EGD, grad_down_EDF, grad_weights_TK


# ---- registration -------------------------------------------------------------------------------
_forward_op = register(
    "expert_ffn(Tensor rows_ND, Tensor up_EGD, Tensor down_EDF, Tensor expert_offsets, Tensor? weights_TK, "
    "Tensor? perm_N, str activation, bool keep_hidden, int sm_margin) -> (Tensor, Tensor)",
    reference.forward,
    _empty_outputs,
    _forward_cuda,
)
_backward_op = register(
    "expert_ffn_backward(Tensor grad_out_ND, Tensor rows_ND, Tensor up_EGD, Tensor down_EDF, Tensor hidden_NG, "
    "Tensor expert_offsets, Tensor? weights_TK, Tensor? perm_N, str activation, bool fp32_weight_grads, "
    "bool needs_rows, bool needs_up, bool needs_down, int sm_margin) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.backward,
    _empty_gradients,
    _backward_cuda,
)


@register_flop_formula(_forward_op.overloadpacket)
def _forward_flops(rows: Any, up: Any, down: Any, *_: Any, **__: Any) -> int:
    """Two products a row, as if no slot were dropped."""
    return 2 * rows[0] * (up[1] * up[2] + down[1] * down[2])


@register_flop_formula(_backward_op.overloadpacket)
def _backward_flops(_grad: Any, rows: Any, up: Any, down: Any, *rest: Any, **__: Any) -> int:
    needs_rows, needs_up, needs_down = rest[-4:-1]
    ups, downs = int(needs_rows) + int(needs_up), 1 + int(needs_down)
    return 2 * rows[0] * (ups * up[1] * up[2] + downs * down[1] * down[2])


# ---- memory that is given for what comes out -------------------------------------------------------------------------
def _forward(buffer_ND: Tensor | None, rows_ND: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `_forward_op`, whose results are new tensors."""
    if buffer_ND is None:
        return _forward_op(rows_ND, *rest)
    if rows_ND.is_cuda and is_plain(rows_ND):
        out_ND, hidden_NG = _forward_cuda(rows_ND, *rest, buffer_ND=buffer_ND)  # type: ignore[misc]
    else:
        out_ND, hidden_NG = _forward_op(rows_ND, *rest)
    return _in_buffer(out_ND, buffer_ND), hidden_NG


def _backward(memory: Memory, grad_out_ND: Tensor, rows_ND: Tensor | Gathered, *rest: Any) -> tuple[Tensor, ...]:
    """As `_backward_op`, whose results are new tensors."""
    direct = grad_out_ND.is_cuda and is_plain(grad_out_ND)
    if isinstance(rows_ND, Gathered) and not direct:
        rows_ND = rows_ND.rows()
    if not direct or (isinstance(rows_ND, Tensor) and all(given is None for given in memory[:4])):
        gradients = _backward_op(grad_out_ND, rows_ND, *rest)
    else:
        gradients = _backward_cuda(grad_out_ND, rows_ND, *rest, memory=memory)  # type: ignore[misc]
    made = zip(gradients, memory[:3], (False, memory.adds, memory.adds), rest[-4:-1], strict=False)
    return *(
        g if given is None or not need else _in_buffer(g, given, adds) for g, given, adds, need in made
    ), gradients[3]


def _in_buffer(result: Tensor, buffer: Tensor, adds: bool = False) -> Tensor:
    """A tensor of its own, that autograd may mark."""
    if result is not buffer:
        buffer.add_(result) if adds else buffer.copy_(result)
    return buffer.view_as(buffer)


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
        out_ND, hidden_NG = _forward(ctx.buffer_ND, *arguments, activation, True, sm_margin)
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
        needs = ctx.needs_input_grad
        memory, adds = Memory(ctx.buffer_ND, hidden=reused), isinstance(ctx.weight_grads, Added)
        if ctx.weight_grads is not None:
            up, down = ctx.weight_grads if adds else [
                segment.take(weight) if need else None
                for segment, weight, need in zip(ctx.weight_grads, (up_EGD, down_EDF), needs[1:3], strict=True)
            ]  # fmt: skip
            memory = memory._replace(up=up, down=down, adds=adds)
        gradients = _backward(
            memory, grad_out_ND, rows_ND, up_EGD, down_EDF, hidden_NG, expert_offsets, weights_TK, perm_N,
            ctx.activation, ctx.fp32_weight_grads, *needs[:3], ctx.sm_margin,
        )  # fmt: skip
        returned = needs[0], needs[1] and not adds, needs[2] and not adds, needs[3]
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

    On a GPU native where `missing` says None, else (and on the CPU) the torch reference, which reads the offsets on the
    host.

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
    check_choice("ops.expert_ffn", "activation", activation, ACTIVATIONS)
    experts, d_model, hidden_dim = down_EDF.shape
    width = 2 * hidden_dim if activation == "swiglu" else hidden_dim
    fits = up_EGD.shape == (experts, width, d_model) and expert_offsets.shape == (experts + 1,)
    if not fits or rows_ND.dim() != 2 or rows_ND.shape[1] != d_model:
        raise ValueError(
            "ops.expert_ffn: rows (N, D), up (E, G, D), down (E, D, F) and offsets (E + 1) must fit, got "
            f"{tuple(rows_ND.shape)}, {tuple(up_EGD.shape)}, {tuple(down_EDF.shape)}, {tuple(expert_offsets.shape)} "
            f"with {activation}"
        )
    wide = rows_ND.dtype in _DTYPES and up_EGD.dtype == torch.float32
    if up_EGD.dtype != down_EDF.dtype or not (wide or up_EGD.dtype == rows_ND.dtype):
        raise ValueError(
            f"ops.expert_ffn: rows and weights must have one dtype, or weights fp32 for fp16 and bf16 rows, got "
            f"{rows_ND.dtype}, {up_EGD.dtype}, {down_EDF.dtype}; cast with .to(rows.dtype)"
        )
    if not wide and (copies is not None or isinstance(weight_grads, Added)):
        raise ValueError(
            f"ops.expert_ffn: copies and gradients to add to are of fp32 weights, got {up_EGD.dtype} for rows of "
            f"{rows_ND.dtype}; leave them out"
        )
    if sm_margin < 0:
        raise ValueError(f"ops.expert_ffn: sm_margin must not be negative, got sm_margin={sm_margin}; 0 leaves none")
    weights_TK, perm_N, gathered = row_weights or (None, None, None)
    check_same_device(
        "ops.expert_ffn", rows=rows_ND, up=up_EGD, down=down_EDF, expert_offsets=expert_offsets,
        row_weights=weights_TK, perm=perm_N, out=out,
    )  # fmt: skip
    if weights_TK is not None and weights_TK.numel() != rows_ND.shape[0]:
        raise ValueError(
            f"ops.expert_ffn: row_weights must hold a weight per row, got {tuple(weights_TK.shape)} for "
            f"{rows_ND.shape[0]} rows"
        )
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
    arguments = rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N, activation, False, sm_margin
    if out is not None:
        return _forward(out, *arguments)[0]
    forward = _forward_cuda if rows_ND.is_cuda and is_plain(rows_ND) else _forward_op
    return forward(*arguments)[0]
