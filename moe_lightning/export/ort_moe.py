"""An MoE layer as onnxruntime's own operator, `com.microsoft.MoE`: one node for all experts.

Legend: T tokens, D d_model, F expert hidden size, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lightning.layers import Experts, MoE
from moe_lightning.ops import Selection

#: Far below the logarithm of any weight, and finite: the operator's softmax takes no infinities.
_NEVER = -1e30


class OrtMoE(nn.Module):
    """What `layer` computes. The operator routes by the softmax of the K largest of what it is given: it is given the
    logarithms of the weights that the layer's own router chose, so that any router fits.

    Raises:
        ValueError: the operator has no such case.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        if layer.experts.up.dtype != torch.float32:
            raise ValueError(
                f"export: onnx_moe ort must be fp32 (weights of the choice would be rounded to less), got "
                f"{layer.experts.up.dtype}; use --onnx_moe portable"
            )
        if layer.experts.activation != "swiglu":
            raise ValueError(
                f"export: onnx_moe ort must have swiglu experts (onnxruntime's gelu is the tanh approximation), got "
                f"activation={layer.experts.activation}; use --onnx_moe portable"
            )
        self.router = layer.router
        self.experts = OrtExperts(layer.experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> (..., D), and the expert ids (T, K) int32; the rows are of no use outside a trace."""
        x_TD = x.reshape(-1, x.shape[-1])
        selection = self.router.select(self.router.gate(x_TD))
        choice_TE, sum_T1 = as_logits(selection, self.router.num_experts)
        y_TD = torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            (x_TD, choice_TE, self.experts.up_interleaved, None, self.experts.down),
            {
                "k": self.router.top_k,
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
                "normalize_routing_weights": 1,
            },
            dtype=x.dtype,
            shape=x_TD.shape,
            version=1,
        )
        return (y_TD * sum_T1).view_as(x), selection.expert_ids_TK


class OrtExperts(nn.Module):
    """The experts' weights as the operator takes them: up (E, 2F, D) with rows gate 0, up 0, gate 1, up 1, ..."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        gate_EFD, up_EFD = experts.up.detach().chunk(2, 1)
        self.up_interleaved = nn.Parameter(torch.stack((gate_EFD, up_EFD), 2).flatten(1, 2), requires_grad=False)
        self.down = nn.Parameter(experts.down.detach(), requires_grad=False)


def as_logits(selection: Selection, num_experts: int) -> tuple[Tensor, Tensor]:
    """Logits (T, E) whose softmax over the K largest is the weights chosen over their sum, and that sum (T, 1).

    A dropped slot (id -1) is nobody's; a weight of 0 is the smallest number there is, which has a logarithm.
    """
    weights_TK, ids_TK = selection.weights_TK, selection.expert_ids_TK
    tiny = torch.finfo(weights_TK.dtype).tiny
    chosen_TKE = ids_TK[:, :, None] == torch.arange(num_experts, device=ids_TK.device)
    sum_T1 = torch.where(ids_TK >= 0, weights_TK, 0.0).sum(1, keepdim=True)
    share_TK = weights_TK / sum_T1
    # NaN > tiny is false: a row of NaN weights, or of zeros alone, chooses as any other; the sum makes it NaN, or zero.
    share_TE = torch.where(chosen_TKE, torch.where(share_TK > tiny, share_TK, tiny)[:, :, None], 0.0).sum(1)
    return torch.where(chosen_TKE.any(1), share_TE.log(), _NEVER), sum_T1
