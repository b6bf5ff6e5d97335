"""torch.compile traces models and their parts. aot_eager spares the code generator, which is not what is tested."""

import pytest
import torch
from tiny_models import loss, make_moe, some_tokens

from moe_lightning.layers import Experts
from moe_lightning.routers import ROUTERS

#: Those of which each has code of its own.
OWN = [name for name in ROUTERS if name not in ("naive_topk", "topk", "frozen_random")]


@pytest.mark.parametrize("router", OWN)
def test_a_bf16_model_is_traced_whole_with_the_same_loss_and_gradients(router):
    """No graph break: nothing on the way waits for a value."""
    torch.compiler.reset()
    model, tokens_BS = make_moe(router, n_layers=1), some_tokens()
    results = []
    for runner in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(runner, tokens_BS)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for traced, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(traced, eager, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("implementation", ["auto", "grouped_mm", "loop"])
def test_fp32_experts_compile(implementation):
    """The region that `--model.compile` compiles, at the default precision."""
    torch.compiler.reset()
    experts = Experts(16, 24, 4, implementation=implementation)
    rows, offsets = torch.randn(9, 16), torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32)
    expected = experts(rows, offsets)
    traced = torch.compile(experts, backend="aot_eager")(rows, offsets)
    torch.testing.assert_close(traced, expected)
