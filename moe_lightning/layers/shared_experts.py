"""What a token gets beside its routed experts, at no cost of routing: shared experts, and zero experts.

Legend: T tokens, D d_model, E experts, Z zero experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.layers.feed_forward import Activation, FeedForward
from moe_lightning.layers.low_precision import Linear
from moe_lightning.ops import Selection


class SharedExperts(FeedForward):
    """Experts that every token takes, computed as one network (DeepSeekMoE, arXiv:2401.06066), (T, D) -> (T, D).

    Args:
        d_model: width D of a token.
        hidden_dim: of all shared experts together.
        activation: as of the routed experts.
        gated: times sigmoid(x @ w), a number per token (Qwen1.5-MoE and Qwen2-MoE).
    """

    def __init__(self, d_model: int, hidden_dim: int, activation: Activation = "swiglu", gated: bool = False) -> None:
        super().__init__(d_model, hidden_dim, activation)
        self.gate = Linear(d_model, 1, bias=False) if gated else None

    @override
    def forward(self, x: Tensor, tokens: object = None) -> tuple[Tensor, None]:
        y, _ = super().forward(x)
        return (y, None) if self.gate is None else (y * self.gate(x).sigmoid(), None)


def without_zero_experts(selection: Selection, num_experts: int) -> Selection:
    """The choices of E experts, among E + Z of which the last Z compute nothing: theirs become dropped slots.

    A zero expert returns the token itself (LongCat-Flash, arXiv:2509.01322, section 2.1), see `zero_expert_weights`.
    """
    is_zero_TK = selection.expert_ids_TK >= num_experts
    return selection._replace(
        weights_TK=selection.weights_TK.masked_fill(is_zero_TK, 0.0),
        expert_ids_TK=selection.expert_ids_TK.masked_fill(is_zero_TK, -1),
        tokens_per_expert_E=selection.tokens_per_expert_E[:num_experts],
    )


def zero_expert_weights(selection: Selection, num_experts: int) -> Tensor:
    """What a token times its zero experts' weights adds up to, over the token: (T, 1)."""
    is_zero_TK = selection.expert_ids_TK >= num_experts
    return torch.where(is_zero_TK, selection.weights_TK, 0.0).sum(1, keepdim=True)


def add_unrouted(
    y_TD: Tensor, x_TD: Tensor, selection: Selection, num_experts: int, shared: SharedExperts | None
) -> Tensor:
    """The output of a layer from that of its routed experts; Z is what the selection has over E."""
    if selection.tokens_per_expert_E.shape[0] > num_experts:
        y_TD = y_TD + (zero_expert_weights(selection, num_experts) * x_TD).to(y_TD.dtype)
    return y_TD if shared is None else y_TD + shared(x_TD)[0]
