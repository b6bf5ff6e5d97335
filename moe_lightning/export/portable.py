"""An MoE layer in operators that every ONNX runtime has: for each of the E experts, gather its tokens and add what it
makes of them.

Legend: T tokens, D d_model, E experts, K top_k.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_lightning.export.expert_loop import expert_loop
from moe_lightning.layers import Experts, MoE


class PortableMoE(nn.Module):
    """What `layer` computes, as one `expert_loop` behind the router; shares its weights."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.activation = layer.experts.activation
        self.experts = nn.ModuleList(PortableExpert(layer.experts, e) for e in range(layer.router.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> (..., D), and the expert ids (T, K) int32; sums over a token's experts are fp32."""
        x_TD = x.reshape(-1, x.shape[-1])
        selection = self.router.select(self.router.gate(x_TD))
        ups, downs = ([getattr(expert, name) for expert in self.experts] for name in ("up", "down"))
        y_TD = expert_loop(x_TD, selection.expert_ids_TK, selection.weights_TK, ups, downs, self.activation)
        return y_TD.to(x.dtype).view_as(x), selection.expert_ids_TK


class PortableExpert(nn.Module):
    """One expert's weights, so that they have a name of their own in the graph."""

    def __init__(self, experts: Experts, number: int) -> None:
        super().__init__()
        self.up = nn.Parameter(experts.up.detach()[number], requires_grad=False)
        self.down = nn.Parameter(experts.down.detach()[number], requires_grad=False)
