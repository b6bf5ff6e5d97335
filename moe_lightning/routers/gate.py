"""The gate: fp32 logits of tokens, on matrix units where the tokens are in bf16.

Legend: T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lightning.ops.library import accum_dtype


def linear_fp32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32 (fp64 for fp64), whatever autocast is on; (T, E).

    Matrix units take bf16 tokens as they are, and an fp32 weight as the sum of three in bf16 with eight of its 24 bits
    each. They add products in fp32, so the logits are as exact as those of the far slower fp32 units.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        if x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32:
            return _SplitLinear.apply(x_TD, weight_ED)
        dtype = accum_dtype(x_TD.dtype)
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        logits = _product(x_TD, torch.cat(_split(weight_ED, 3)).mT)
        return logits.view(-1, 3, weight_ED.shape[0]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the weight is as exact as the logits; that of the tokens is rounded to their dtype anyway."""
        x_TD, weight_ED = ctx.saved_tensors
        parts = _split(grad_TE, 3)
        split_grad = torch.cat(parts, 1)
        grad_weight = _product(split_grad.mT, x_TD).view(3, *weight_ED.shape).sum(0)
        high, middle = _split(weight_ED, 2)
        grad_x = torch.cat([split_grad, parts[0]], 1) @ torch.cat([high, high, high, middle])
        return grad_x, grad_weight


def _split(value: Tensor, parts: int) -> list[Tensor]:
    """bf16 tensors, largest first, whose sum has eight bits of `value` for each."""
    split: list[Tensor] = []
    for _ in range(parts):
        split.append(value.bfloat16())
        value = value - split[-1]
    return split


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of bf16 matrices, in fp32, also where backward is called under autocast."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        return a.float() @ b.float()
