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
from moe_lightning.ops.split_bf16 import split_bf16, sum_parts


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
        return sum_parts(_product(x_TD, split_bf16(weight_ED, (0, 1, 2), dim=0).mT), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the weight is as exact as the logits; that of the tokens is rounded to their dtype anyway."""
        x_TD, weight_ED = ctx.saved_tensors
        grad = split_bf16(grad_TE, (0, 1, 2, 0), dim=1)
        grad_weight = sum_parts(_product(grad[:, : 3 * weight_ED.shape[0]].mT, x_TD), dim=0)
        return grad @ split_bf16(weight_ED, (0, 0, 0, 1), dim=0), grad_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of bf16 matrices, in fp32, also where backward is called under autocast."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        return a.float() @ b.float()
