"""Top-k selection: ids, weights, load and the invalid-row count from router logits, in one call.

Shapes: T tokens, E experts, K = top_k.

Order: logit descending, then expert id ascending; -0 equals +0; NaN ranks as -inf. For any input bits the ids
of a row are in [0, E) and distinct. Weights are the softmax over the K selected logits, in fp32 (fp64 for
fp64 logits). A row is invalid when it holds a NaN or a +inf, or has fewer than K experts above -inf: its
weights are NaN, its ids stay legal, and ``invalid_rows`` counts it. Nothing here waits for the device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops import native
from moe_lightning.ops.library import register


class Selection(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    weights_TK: Tensor
    """fp32 (fp64 for fp64 logits), a row sums to 1; NaN in invalid rows."""
    expert_ids_TK: Tensor
    """int32, best first."""
    tokens_per_expert_E: Tensor
    """int32 counts of the ids; they sum to T * K."""
    invalid_rows: Tensor
    """int32 scalar on the device."""


# ---- torch reference -------------------------------------------------------------------------------------
def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(logits_TE: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Weights for given ids, and which rows are invalid (T,)."""
    above_T = (logits_TE > -torch.inf).sum(1)  # NaN is not above
    bad_T = (logits_TE.isnan() | (logits_TE == torch.inf)).any(1) | (above_T < expert_ids_TK.shape[1])
    selected_TK = logits_TE.gather(1, expert_ids_TK.long()).to(_weights_dtype(logits_TE.dtype))
    # Added, not filled in, so that the gradient of an invalid row is NaN as well.
    poison_T = torch.where(bad_T, torch.nan, 0.0).to(selected_TK.dtype)
    return torch.softmax(selected_TK + poison_T[:, None], dim=1), bad_T


def _reference(logits_TE: Tensor, top_k: int) -> Selection:
    # + 0.0 turns -0 into +0: a radix sort tells them apart.
    ranked_TE = torch.where(logits_TE.isnan(), -torch.inf, logits_TE).detach() + 0.0
    ids_TK = ranked_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k].int().contiguous()
    weights_TK, bad_T = _weights(logits_TE, ids_TK)
    ids_N = ids_TK.reshape(-1).long()
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int32, device=logits_TE.device)
    counts_E = counts_E.scatter_add(0, ids_N, torch.ones_like(ids_N, dtype=torch.int32))
    return Selection(weights_TK, ids_TK, counts_E, bad_T.sum(dtype=torch.int32))


# ---- native call -----------------------------------------------------------------------------------------
def _empty_outputs(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    return (
        logits_TE.new_empty((tokens, top_k), dtype=_weights_dtype(logits_TE.dtype)),
        logits_TE.new_empty((tokens, top_k), dtype=torch.int32),
        logits_TE.new_empty((experts,), dtype=torch.int32),
        logits_TE.new_empty((), dtype=torch.int32),
    )


def _call(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = weights_TK, ids_TK, counts_E, invalid = _empty_outputs(logits_TE, top_k)
    tokens, experts = logits_TE.shape
    if tokens == 0:
        counts_E.zero_()
        invalid.zero_()
        return outputs
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    native.module(logits_TE.device.type).select_forward(
        logits_TE.data_ptr(), logits_TE.stride(0),
        weights_TK.data_ptr(), ids_TK.data_ptr(), counts_E.data_ptr(), invalid.data_ptr(),
        tokens, experts, top_k, native.DTYPE_CODES[logits_TE.dtype],
        *native.place(logits_TE), torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _call_backward(grad_TK: Tensor, weights_TK: Tensor, ids_TK: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    grad_logits_TE = _fake_backward(grad_TK, weights_TK, ids_TK, num_experts, dtype)
    tokens, top_k = weights_TK.shape
    if tokens == 0:
        return grad_logits_TE
    grad_TK = grad_TK.contiguous()
    native.module(grad_TK.device.type).select_backward(
        grad_TK.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(), grad_logits_TE.data_ptr(),
        tokens, num_experts, top_k, native.DTYPE_CODES[dtype], *native.place(grad_TK),
    )  # fmt: skip
    return grad_logits_TE


# ---- fake and registration -------------------------------------------------------------------------------
def _fake_backward(grad_TK: Tensor, weights_TK: Tensor, ids_TK: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    return weights_TK.new_empty((weights_TK.shape[0], num_experts), dtype=dtype)


_forward_op = register(
    "select_forward(Tensor logits_TE, int top_k) -> (Tensor, Tensor, Tensor, Tensor)", _call, _empty_outputs
)
_backward_op = register(
    "select_backward(Tensor grad_TK, Tensor weights_TK, Tensor ids_TK, int num_experts, ScalarType dtype) -> Tensor",
    _call_backward,
    _fake_backward,
)


# ---- autograd --------------------------------------------------------------------------------------------
class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights_TK, ids_TK, counts_E, invalid = _forward_op(logits_TE, top_k)
        ctx.save_for_backward(weights_TK, ids_TK)
        ctx.num_experts, ctx.dtype = logits_TE.shape[1], logits_TE.dtype
        ctx.mark_non_differentiable(ids_TK, counts_E, invalid)
        return weights_TK, ids_TK, counts_E, invalid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        return _backward_op(grad_TK, *ctx.saved_tensors, ctx.num_experts, ctx.dtype), None


# ---- public ----------------------------------------------------------------------------------------------
def _validate(component: str, logits_TE: Tensor, top_k: int) -> None:
    if logits_TE.dim() != 2:
        raise ValueError(
            f"{component}: logits must have shape (tokens, experts), got {tuple(logits_TE.shape)}; "
            "flatten the batch first, x.reshape(-1, num_experts)"
        )
    if logits_TE.dtype not in native.DTYPE_CODES:
        raise ValueError(f"{component}: logits must be fp64, fp32, fp16 or bf16, got {logits_TE.dtype}")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(
            f"{component}: top_k must be in [1, num_experts], got top_k={top_k}, num_experts={logits_TE.shape[1]}"
        )


def select(logits_TE: Tensor, top_k: int, implementation: str = "auto") -> Selection:
    """Select the ``top_k`` experts of each token and their softmax weights.

    Args:
        logits_TE: router logits, fp64, fp32, fp16 or bf16; any strides.
        top_k: experts a token, in [1, E].
        implementation: ``native`` (E <= 1024, K <= 32), ``torch`` (the reference) or ``auto``: native where
            it can be had, else the reference with one warning.

    Raises:
        ValueError: wrong rank, dtype, top_k or implementation.
    """
    _validate("ops.select", logits_TE, top_k)
    limit = None
    if logits_TE.shape[1] > native.MAX_EXPERTS or top_k > native.MAX_TOP_K:
        limit = (
            f"the kernels take num_experts <= {native.MAX_EXPERTS} and top_k <= {native.MAX_TOP_K}, "
            f"got num_experts={logits_TE.shape[1]}, top_k={top_k}"
        )
    if not native.use_native("ops.select", implementation, logits_TE.device.type, limit):
        return _reference(logits_TE, top_k)
    if logits_TE.requires_grad and torch.is_grad_enabled():
        return Selection(*_Select.apply(logits_TE, top_k))
    return Selection(*_forward_op(logits_TE, top_k))


def weights_at(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Weights that :func:`select` would give to these ids, for routers that choose ids by another score.

    The ids of a row must be distinct and in [0, E). The rule for invalid rows is the same. Differentiable.
    """
    _validate("ops.weights_at", logits_TE, expert_ids_TK.shape[-1])
    if expert_ids_TK.dim() != 2 or expert_ids_TK.shape[0] != logits_TE.shape[0]:
        raise ValueError(
            "ops.weights_at: expert_ids must have shape (tokens, top_k), "
            f"got {tuple(expert_ids_TK.shape)} for logits {tuple(logits_TE.shape)}"
        )
    return _weights(logits_TE, expert_ids_TK)[0]
