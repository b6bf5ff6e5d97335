"""A model traces whole: no graph break, so nothing in it waits for a value. aot_eager spares the code generator."""

import pytest
import torch
from tiny import loss, make_moe, some_tokens

from moe_lightning.routers import ROUTERS


@pytest.mark.parametrize("router", list(ROUTERS))
def test_traced_whole_with_the_same_loss_and_gradients(router):
    torch.compiler.reset()
    model, tokens_BS = make_moe(router, n_layers=1), some_tokens()
    value = loss(model, tokens_BS)
    value.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    traced = loss(torch.compile(model, backend="aot_eager", fullgraph=True), tokens_BS)
    traced.backward()
    torch.testing.assert_close(traced, value)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
