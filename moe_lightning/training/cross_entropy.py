"""The loss: cross-entropy of the next token, in fp32.

Of a large vocabulary the logits and their gradient would be the largest tensors of a step. They are made for some
tokens at a time, and so are, in the forward pass, the gradients of hidden states and head: no logits are kept for
backward (Liger, arXiv:2410.10989). Torch 2.13 has `linear_cross_entropy` for it, which is not used: of bf16 tensors it
gives loss and gradients in bf16, less exact than the plain loss, whose value and head gradient are fp32.

Legend: B batch, S sequence, T tokens, C tokens of a chunk, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lightning.layers.experts import compute_dtype
from moe_lightning.ops.library import accum_dtype

#: From this size on logits are made in chunks.
LARGE_VOCABULARY = 16_384
#: Logits of a chunk: 2^27 are 268 MB in bf16.
CHUNK_LOGITS = 2**27

CrossEntropy = Callable[[Tensor, Tensor, str], Tensor]


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor, reduction: str) -> Tensor:
    """In fp32; compiled, the logits are never held in it."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction=reduction)


def chunk_losses(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Of each token, in fp32 (C)."""
    wide_CV = logits_CV.to(accum_dtype(logits_CV.dtype))
    return wide_CV.logsumexp(1) - wide_CV.gather(1, targets_C[:, None])[:, 0]


def chunk_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the gradient of their sum in the dtype of the logits (C, V)."""
    wide_CV = logits_CV.to(accum_dtype(logits_CV.dtype))
    log_sums_C = wide_CV.logsumexp(1)
    losses_C = log_sums_C - wide_CV.gather(1, targets_C[:, None])[:, 0]
    probabilities_CV = (wide_CV - log_sums_C[:, None]).exp()
    is_target_CV = targets_C[:, None] == torch.arange(logits_CV.shape[1], device=logits_CV.device)
    return losses_C, torch.where(is_target_CV, probabilities_CV - 1, probabilities_CV).to(logits_CV.dtype)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One for all modules: what is not a product becomes a kernel that holds no logits in fp32."""
    return torch.compile(function)


def tokens_per_chunk(vocab_size: int) -> int:
    """C, a power of two, so that most batches leave no shorter last chunk."""
    return 1 << (max(CHUNK_LOGITS // vocab_size, 1).bit_length() - 1)


def linear_cross_entropy(
    hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, reduction: str, use_compiled: bool = False
) -> Tensor:
    """`cross_entropy` of the logits that a head (V, D) makes of hidden states, without ever holding all of them.

    The products are in autocast's dtype where it is on. No value is read by the host.

    Args:
        hidden_BSD: of any float dtype.
        weight_VD: of the head, which may be the embedding.
        targets_BS: int64 in [0, V).
        reduction: "mean": a scalar, whose gradient can be taken once; "none": a value per token (T), without gradient.
        use_compiled: compile what is not a product.

    Raises:
        ValueError: another reduction, or a gradient is wanted of "none".
    """
    hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
    dtype = compute_dtype(hidden_TD)
    if reduction == "mean":
        of_chunk = compiled(chunk_gradient) if use_compiled else chunk_gradient
        return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, dtype, of_chunk)
    if reduction != "none":
        raise ValueError(f"cross_entropy: reduction must be mean or none, got {reduction!r}")
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        raise ValueError("cross_entropy: reduction=none has no gradient here, got one to take; use torch.no_grad")
    losses = compiled(chunk_losses) if use_compiled else chunk_losses
    losses_T = hidden_TD.new_empty(targets_T.shape[0], dtype=accum_dtype(dtype))
    for rows, logits_CV in _chunks_of_logits(hidden_TD.to(dtype), weight_VD.to(dtype)):
        losses_T[rows] = losses(logits_CV, targets_T[rows])
    return losses_T


def _chunks_of_logits(hidden_TD: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens, and their logits (C, V)."""
    size = tokens_per_chunk(weight_VD.shape[0])
    for start in range(0, hidden_TD.shape[0], size):
        rows = slice(start, start + size)
        yield rows, F.linear(hidden_TD[rows], weight_VD)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        dtype: torch.dtype,
        of_chunk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        ctx.tokens, ctx.dtypes = targets_T.shape[0], (hidden_TD.dtype, weight_VD.dtype)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses_T = hidden_TD.new_empty(ctx.tokens, dtype=accum_dtype(dtype))
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=accum_dtype(dtype)) if needs_weight else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for rows, logits_CV in _chunks_of_logits(hidden_TD, weight_VD):
                losses_T[rows], grad_logits_CV = of_chunk(logits_CV, targets_T[rows])
                if grad_hidden_TD is not None:
                    torch.mm(grad_logits_CV, weight_VD, out=grad_hidden_TD[rows])
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, grad_logits_CV.mT, hidden_TD[rows])
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return losses_T.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        of_hidden, of_weight = ctx.dtypes
        # Only now: in fp16 small gradients would be lost, divided by T and without the scale of the loss.
        grad = grad / ctx.tokens
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD.to(of_hidden).mul_(grad)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(grad).to(of_weight)  # a second backward finds it changed and raises
        return grad_hidden_TD, grad_weight_VD, None, None, None


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums += a @ b`` in the dtype of the sums, which on a GPU the product of 16-bit matrices may have."""
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
    elif sums.is_cuda:
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))
