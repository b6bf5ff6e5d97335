"""An MoE layer on our expert kernels beside the loop: outputs, gradients, dropped slots, a training run."""

import pytest
import torch

from moe_lightning.layers import Experts, MoE
from moe_lightning.models import DecoderMoE, DecoderMoEConfig
from moe_lightning.ops import native
from moe_lightning.ops.expert_ffn import missing
from moe_lightning.routers import ROUTERS

SIZES = {
    "vocab_size": 64, "d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_dim": 96, "num_experts": 8, "top_k": 2,
}  # fmt: skip
CUDA = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        bool(torch.cuda.is_available() and (native.missing("cuda") or missing(torch.bfloat16, CUDA, 64, 64))),
        reason="the expert kernels are not built, or not for this GPU",
    ),
]


def layer(router, implementation, **options):
    torch.manual_seed(3)
    moe = MoE(ROUTERS[router](64, 8, 2, **options), Experts(64, 96, 8, "swiglu", implementation))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.mul_(8)
    return moe.cuda().train()


def output_and_gradients(moe, x_TD, grad_TD, dtype):
    leaf_TD = x_TD.clone().requires_grad_()
    with torch.autocast("cuda", dtype):
        y_TD, _ = moe(leaf_TD)
    y_TD.float().backward(grad_TD)
    return [y_TD.detach(), leaf_TD.grad, *(parameter.grad for parameter in moe.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("router", ["naive_topk", "fused_select", "sinkhorn"])
def test_agrees_with_the_loop(router, capacity_factor, dtype):
    x_TD, grad_TD = torch.randn(300, 64, device="cuda"), torch.randn(300, 64, device="cuda")
    ours, loop = (layer(router, name, capacity_factor=capacity_factor) for name in ("auto", "loop"))
    assert ours.experts.implementation_for(dtype, CUDA) == "cutlass"
    results = [output_and_gradients(moe, x_TD, grad_TD, dtype) for moe in (ours, loop)]
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        assert (actual.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def losses(implementation):
    torch.manual_seed(0)
    model = DecoderMoE(DecoderMoEConfig(**SIZES, experts=implementation)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        start, step = torch.randint(64, (16, 1), generator=generator), torch.randint(1, 5, (16, 1), generator=generator)
        tokens_BS = ((start + step * torch.arange(33)) % 64).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens_BS[:, :-1]).logits_BSV
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


def test_trains_as_with_the_loop():
    ours, loop = losses("cutlass"), losses("loop")
    assert loop[-10:].mean() < 0.5 * loop[:10].mean()
    assert (ours - loop).abs()[:20].max() < 0.02
    assert (ours[-20:].mean() - loop[-20:].mean()).abs() < 0.1 * loop[-20:].mean() + 0.02
