"""One token, one expert at a time, in fp64: what an MoE layer computes, and helpers to compare with it.

Legend: T tokens, D d_model, E experts, K top_k.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lightning.layers import Experts, MoE, SharedExperts
from moe_lightning.routers import ROUTERS


def make_moe(
    router: str = "naive_topk", experts: str = "loop", num_experts: int = 8, top_k: int = 2, spread: float = 10.0, **kw
) -> MoE:
    """A small layer in evaluation mode; weights larger than at the start of training, so that differences show."""
    activation, zero, shared = kw.pop("activation", "swiglu"), kw.pop("n_zero_experts", 0), kw.pop("shared", None)
    of_all = ROUTERS[router](16, num_experts + zero, top_k, **kw)
    moe = MoE(of_all, Experts(16, 24, num_experts, activation, experts), shared=shared, n_zero_experts=zero)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.mul_(spread)
    return moe.eval()


def naive_moe(x_TD: Tensor, moe: MoE) -> Tensor:
    """fp64 output for the layer's own choice of experts and weights."""
    up, down = moe.experts.up.double(), moe.experts.down.double()
    selection = moe.router(x_TD).selection
    rows = []
    for x_D, ids, weights in zip(
        x_TD.double(), selection.expert_ids_TK.tolist(), selection.weights_TK.double(), strict=True
    ):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= moe.num_experts:
                y_D = y_D + weight * x_D
            elif expert >= 0:
                hidden = up[expert] @ x_D
                if moe.experts.activation == "gelu":
                    hidden = F.gelu(hidden)
                else:
                    gate, value = hidden.chunk(2)
                    hidden = gate * torch.sigmoid(gate) * value
                y_D = y_D + weight * (down[expert] @ hidden)
        rows.append(y_D)
    y_TD = torch.stack(rows)
    return y_TD if moe.shared is None else y_TD + naive_shared(x_TD.double(), moe.shared)


def naive_shared(x_TD: Tensor, shared: SharedExperts) -> Tensor:
    """swiglu, in the dtype of the tokens."""
    gate_TF, value_TF = (x_TD @ shared.up.weight.to(x_TD.dtype).T).chunk(2, 1)
    y_TD = (gate_TF * torch.sigmoid(gate_TF) * value_TF) @ shared.down.weight.to(x_TD.dtype).T
    return y_TD if shared.gate is None else y_TD * torch.sigmoid(x_TD @ shared.gate.weight.to(x_TD.dtype).T)


def output_and_gradients(moe: MoE, x_TD: Tensor, grad_TD: Tensor) -> dict[str, Tensor]:
    """Output, and the gradient of the input and of every parameter by name."""
    moe.zero_grad(set_to_none=True)
    leaf_TD = x_TD.detach().clone().requires_grad_()
    y_TD, _ = moe(leaf_TD)
    y_TD.backward(grad_TD.to(y_TD.dtype))
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters() if p.requires_grad}
    return {"output": y_TD.detach(), "input": leaf_TD.grad, **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name].float(), expected[name].float(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
