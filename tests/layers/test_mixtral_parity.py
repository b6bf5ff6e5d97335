"""The MoE layer equals transformers' MixtralSparseMoeBlock, output and every gradient."""

import pytest
import torch
from moe_reference import assert_same, make_moe, output_and_gradients

mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers")


def block_like(moe) -> torch.nn.Module:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_local_experts=moe.router.num_experts,
        num_experts_per_tok=moe.router.top_k,
    )
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(moe.experts.up)
        block.experts.down_proj.copy_(moe.experts.down)
    return block


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 1), (5, 5)])
@pytest.mark.parametrize("experts", ["loop", "grouped_mm"])
@pytest.mark.parametrize("router", ["naive_topk", "masked_matmul", "fused_select"])
def test_same_output_and_gradients(router, experts, num_experts, top_k):
    moe = make_moe(router, experts, num_experts, top_k)
    block = block_like(moe)
    x_BSD, grad_BSD = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    ours = output_and_gradients(moe, x_BSD, grad_BSD)

    leaf = x_BSD.clone().requires_grad_()
    y_BSD = block(leaf)
    y_BSD.backward(grad_BSD)
    theirs = {
        "output": y_BSD.detach(),
        "input": leaf.grad,
        "router.weight": block.gate.weight.grad,
        "experts.up": block.experts.gate_up_proj.grad,
        "experts.down": block.experts.down_proj.grad,
    }
    assert y_BSD.abs().mean() > 1e-3
    assert_same(ours, theirs, rtol=1e-4, atol=1e-5)
