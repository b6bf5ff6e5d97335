"""The kernels of the experts' feed-forward network as ops, and the memory that they may be given for their outputs.

Legend: N rows, E experts, D d_model, F hidden size, G = 2F for SwiGLU (gate, then up) or F for GELU, T tokens, K top_k.

Native on CUDA in fp16 and bf16, by CUTLASS's building blocks, with fp32 sums, and never waiting for the device: the
activation and the combine weight are part of the first product, their gradients part of the first product of backward.
What they cannot take (`missing`) is left to the torch reference.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_lightning.ops import native
from moe_lightning.ops.expert_ffn import reference
from moe_lightning.ops.library import is_plain, register
from moe_lightning.ops.permute import Gathered

ACTIVATIONS = ("swiglu", "gelu")
"""In the order of their codes in ``kernels/include/grouped_ffn.h``."""
DTYPES = (torch.float16, torch.bfloat16)
"""Of rows and weights that the kernels take."""


class Added(NamedTuple):
    """fp32 gradients of up and down, to which those of a backward pass are added; it returns none of them."""

    up: Tensor
    down: Tensor


class GradientMemory(NamedTuple):
    """Where gradients are written; None for new tensors."""

    rows: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    hidden: Tensor | None = None
    accumulate: bool = False
    """Whether those of up and down, which are fp32, are added to what is there."""


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
    if dtype not in DTYPES:
        return f"the expert kernels take fp16 and bf16, got {dtype}; use --trainer.precision bf16-mixed"
    if d_model % 8 or hidden_dim % 8:
        return f"d_model and hidden_dim must be multiples of 8, got d_model={d_model}, hidden_dim={hidden_dim}"
    capability = _capability(device)
    if capability < (8, 0):
        return f"the expert kernels need compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    return None


#: Asked of every layer, and of each chunk of its rows.
_capability = functools.cache(torch.cuda.get_device_capability)


# ---- native call -----------------------------------------------------------------------------------------
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
    memory: GradientMemory = GradientMemory(),  # noqa: B008  it is immutable
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
    of_weights |= {"fp32": fp32_weight_grads, "accumulate": memory.accumulate}
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
        _weight_backward(kernels, place, of_weights, offsets, grad_out_ND, h_NF, grad_down_EDF)
    del h_NF
    grad_rows_memory = memory.rows
    if isinstance(rows_ND, Gathered):
        # The hidden rows may be written over when nothing is read again; then so may the outputs' gradient, read above.
        reused = None if memory.hidden is None else grad_out_ND
        rows_ND = rows_ND.rows(reused) if needs_up else _empty_gradient(grad_out_ND, True, reused)
        grad_rows_memory = rows_ND
    grad_up_EGD = _empty_gradient(up_EGD, needs_up, memory.up, fp32_weight_grads)
    if needs_up:
        rows_ND = rows_ND.contiguous()
        _weight_backward(kernels, place, of_weights, offsets, grad_hidden_NG, rows_ND, grad_up_EGD)
    grad_rows_ND = _empty_gradient(rows_ND, needs_rows, grad_rows_memory)
    if needs_rows:
        kernels.ffn_up_backward(
            place, shape, grad_hidden=grad_hidden_NG.data_ptr(), up=up_EGD.data_ptr(), expert_offsets=offsets,
            grad_rows=grad_rows_ND.data_ptr(),
        )  # fmt: skip
    return grad_rows_ND, grad_up_EGD, grad_down_EDF, grad_weights_TK


def _weight_backward(
    kernels: ModuleType,
    place: tuple[int, int],
    of_weights: dict[str, Any],
    offsets: int,
    grad_NO: Tensor,
    input_NI: Tensor,
    grad_weight_EOI: Tensor,
) -> None:
    """Per expert the product of its rows' gradient and inputs, in `grad_weight_EOI`; `offsets` is an address."""
    kernels.ffn_weight_backward(
        place, of_weights, grad=grad_NO.data_ptr(), input=input_NI.data_ptr(), expert_offsets=offsets,
        grad_weight=grad_weight_EOI.data_ptr(), outputs=grad_weight_EOI.shape[1], inputs=grad_weight_EOI.shape[2],
    )  # fmt: skip


def _shape(rows_ND: Tensor, down_EDF: Tensor, activation: str, sm_margin: int) -> dict[str, int]:
    """The fields of ``FfnShape`` in ``kernels/include/grouped_ffn.h``."""
    experts, d_model, hidden_dim = down_EDF.shape
    return {
        "num_rows": rows_ND.shape[0], "d_model": d_model, "hidden_dim": hidden_dim, "experts": experts,
        "activation": ACTIVATIONS.index(activation), "dtype": native.DTYPE_CODES[rows_ND.dtype],
        "sm_margin": sm_margin,
    }  # fmt: skip


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


# ---- registration ----------------------------------------------------------------------------------------
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


# ---- the ops, with memory for what comes out -------------------------------------------------------------
def forward(
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
    """Outputs (N, D), in the buffer where one is given, and if kept the hidden rows before the activation (N, G)."""
    arguments = rows_ND, up_EGD, down_EDF, expert_offsets, weights_TK, perm_N, activation, keep_hidden, sm_margin
    # The results of a registered op are new tensors.
    if (buffer_ND is not None or not keep_hidden) and rows_ND.is_cuda and is_plain(rows_ND):
        out_ND, hidden_NG = _forward_cuda(*arguments, buffer_ND)
    else:
        out_ND, hidden_NG = _forward_op(*arguments)
    return _in_memory(out_ND, buffer_ND), hidden_NG


def backward(
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
    memory: GradientMemory,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, up, down and weights, in the memory where it is given; empty where they are not needed."""
    direct = grad_out_ND.is_cuda and is_plain(grad_out_ND)
    if isinstance(rows_ND, Gathered) and not direct:
        rows_ND = rows_ND.rows()
    arguments = (
        up_EGD, down_EDF, hidden_NG, expert_offsets, weights_TK, perm_N, activation, fp32_weight_grads,
        needs_rows, needs_up, needs_down, sm_margin,
    )  # fmt: skip
    if direct and (isinstance(rows_ND, Gathered) or any(given is not None for given in memory[:4])):
        gradients = _backward_cuda(grad_out_ND, rows_ND, *arguments, memory)
    else:
        gradients = _backward_op(grad_out_ND, rows_ND, *arguments)
    grad_rows_ND, grad_up_EGD, grad_down_EDF, grad_weights_TK = gradients
    return (
        _in_memory(grad_rows_ND, memory.rows if needs_rows else None),
        _in_memory(grad_up_EGD, memory.up if needs_up else None, memory.accumulate),
        _in_memory(grad_down_EDF, memory.down if needs_down else None, memory.accumulate),
        grad_weights_TK,
    )


def _in_memory(result: Tensor, memory: Tensor | None, accumulate: bool = False) -> Tensor:
    """The result itself, or where memory is given a tensor of its own there, that autograd may mark."""
    if memory is None:
        return result
    if result is not memory:
        memory.add_(result) if accumulate else memory.copy_(result)
    return memory.view_as(memory)
