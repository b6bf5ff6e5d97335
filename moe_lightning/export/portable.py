"""An MoE layer in operators that every ONNX runtime has: for each of the E experts, gather its tokens and add what it
makes of them.

Legend: T tokens, D d_model, F expert hidden size, E experts, K top_k, M tokens of one expert.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.activation import activate


class PortableMoE(nn.Module):
    """What `layer` computes, shapes alone deciding which operators run; shares its weights.

    The loop is over all experts, not over those that a batch meets: a trace would drop the idle ones.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.experts = nn.ModuleList(PortableExpert(layer.experts, e) for e in range(layer.router.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> (..., D), and the expert ids (T, K) int32; sums over a token's experts are fp32."""
        x_TD = x.reshape(-1, x.shape[-1])
        selection = self.router.select(self.router.gate(x_TD))
        y_TD = x_TD.new_zeros(x_TD.shape, dtype=selection.weights_TK.dtype)
        for number, expert in enumerate(self.experts):
            tokens_M, choices_M = (selection.expert_ids_TK == number).nonzero(as_tuple=True)
            weights_M = selection.weights_TK[tokens_M, choices_M]
            y_TD = y_TD.index_add(0, tokens_M, expert(x_TD[tokens_M]) * weights_M[:, None])
        return y_TD.to(x.dtype).view_as(x), selection.expert_ids_TK


class PortableExpert(nn.Module):
    """One expert with weights of its own, so that they have a name of their own in the graph."""

    def __init__(self, experts: Experts, number: int) -> None:
        super().__init__()
        self.activation = experts.activation
        self.up = nn.Parameter(experts.up.detach()[number], requires_grad=False)
        self.down = nn.Parameter(experts.down.detach()[number], requires_grad=False)

    def forward(self, x_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        return F.linear(activate(F.linear(x_MD, self.up), self.activation), self.down)
