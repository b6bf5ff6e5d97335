"""Other people's MoE layers on our weights, where they are installed. Each raises ImportError where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.layers import MoE
from moe_lightning.ops import select

#: A layer as a function of its tokens (T, D), and what gets a gradient.
Peer = tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]


def mixtral(moe: MoE, d_model: int, hidden_dim: int) -> Peer:
    """transformers' `MixtralSparseMoeBlock` with its `grouped_mm` experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=hidden_dim,
        num_local_experts=moe.router.num_experts,
        num_experts_per_tok=moe.router.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(moe.router.weight.detach())
    block.experts.gate_up_proj, block.experts.down_proj = moe.experts.up, moe.experts.down
    leaves = block.gate.weight, moe.experts.up, moe.experts.down
    return lambda x_TD: block(x_TD[None])[0], leaves


def liger(moe: MoE, d_model: int, hidden_dim: int) -> Peer:
    """Liger's fused MoE (Triton), which begins after the selection: gate and selection are ours."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weight_ED = moe.router.weight

    def call(x_TD: Tensor) -> Tensor:
        selection: Any = select(nn.functional.linear(x_TD, weight_ED), moe.router.top_k)
        weights_TK = selection.weights_TK.to(x_TD.dtype)
        return LigerFusedMoEFunction.apply(x_TD, moe.experts.up, moe.experts.down, selection.expert_ids_TK, weights_TK)

    return call, (weight_ED, moe.experts.up, moe.experts.down)


#: By the name that is asked for: what the table calls it, and how it is made.
PEERS: dict[str, tuple[str, Callable[[MoE, int, int], Peer]]] = {
    "transformers": ("transformers: Mixtral, grouped_mm", mixtral),
    "liger": ("Liger: fused MoE", liger),
}
