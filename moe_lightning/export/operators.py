"""Operators for tracing that torch has no ONNX for: the experts' loop as a single one, and a stable sort.

Legend: T tokens, D d_model, F expert hidden size, G = 2F for SwiGLU and F for GELU, E experts, K top_k, M tokens of one
expert.
"""

from __future__ import annotations

import math
from typing import Any

from onnxscript import opset18
from torch import Tensor
from torch.nn import functional as F

from moe_lightning.layers.feed_forward import activate
from moe_lightning.ops.library import register

#: Its stubs know no Python numbers.
op: Any = opset18


def _call(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, ups: list[Tensor], downs: list[Tensor], activation: Any
) -> Tensor:
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=weights_TK.dtype)
    for number, (up_GD, down_DF) in enumerate(zip(ups, downs, strict=True)):
        tokens_M, choices_M = (expert_ids_TK == number).nonzero(as_tuple=True)
        hidden_MF = activate(F.linear(x_TD[tokens_M], up_GD), activation)
        y_TD.index_add_(0, tokens_M, F.linear(hidden_MF, down_DF) * weights_TK[tokens_M, choices_M, None])
    return y_TD


def _fake(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape, dtype=weights_TK.dtype)


#: Sums of the weighted outputs of each token's experts, (T, D) in the dtype of the weights; id -1 is dropped. `ups` are
#: (G, D), `downs` (D, F), one an expert.
expert_loop = register(
    "expert_loop(Tensor x_TD, Tensor expert_ids_TK, Tensor weights_TK, Tensor[] ups, Tensor[] downs, str activation)"
    " -> Tensor",
    _call,
    _fake,
)


def expert_loop_onnx(x: Any, ids: Any, weights: Any, ups: list[Any], downs: list[Any], activation: str) -> Any:
    """`expert_loop` in ONNX. The loop is over all experts, not over those that a batch meets."""
    y = op.Expand(op.CastLike(0.0, weights), op.Shape(x))
    for number, (up, down) in enumerate(zip(ups, downs, strict=True)):
        slots = op.NonZero(op.Equal(ids, number))
        tokens = op.Gather(slots, 0, axis=0)
        hidden = _activate_onnx(op.Gemm(op.Gather(x, tokens, axis=0), up, transB=1), activation)
        weight = op.Unsqueeze(op.GatherND(weights, op.Transpose(slots, perm=[1, 0])), [1])
        weighted = op.Mul(op.CastLike(op.Gemm(hidden, down, transB=1), weights), weight)
        y = op.ScatterND(y, op.Unsqueeze(tokens, [1]), weighted, reduction="add")
    return y


def _activate_onnx(hidden: Any, activation: str) -> Any:
    if activation == "gelu":
        half, one, root = (op.CastLike(value, hidden) for value in (0.5, 1.0, math.sqrt(0.5)))
        return op.Mul(op.Mul(hidden, half), op.Add(op.Erf(op.Mul(hidden, root)), one))
    gate, up = op.Split(hidden, num_outputs=2, axis=-1)
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


def stable_sort(self: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """Values and indices of all elements along `dim`: TopK of them all, which gives equal ones lower index first."""
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
