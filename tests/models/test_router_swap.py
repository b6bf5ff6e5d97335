"""Weights trained with one router serve another."""

import pytest
import torch
from tiny_models import loss, make_moe, some_tokens

from moe_lightning.routers import ROUTERS


def trained(router: str) -> torch.nn.Module:
    model = make_moe(router)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = some_tokens(4, 17)
    first = loss(model, batch).item()
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
    assert value.item() < first - 0.5
    return model.eval()


#: In evaluation all of these are the softmax of the K highest logits.
SAME_IN_EVALUATION = ("naive_topk", "masked_matmul", "fused_select", "sinkhorn", "topk")


@pytest.mark.parametrize("router", SAME_IN_EVALUATION)
def test_evaluation_does_not_depend_on_the_router(router):
    model, held_out = trained(router), some_tokens(4, 17)
    with torch.no_grad():
        expected = loss(model, held_out).item()
        for other in SAME_IN_EVALUATION:
            swapped = make_moe(other).eval()
            assert list(swapped.state_dict()) == list(model.state_dict())
            swapped.load_state_dict(model.state_dict())
            assert loss(swapped, held_out).item() == pytest.approx(expected, rel=1e-5)


def test_expert_implementations_share_their_weights():
    model, held_out = trained("fused_select"), some_tokens(4, 17)
    for experts in ("loop", "grouped_mm"):
        swapped = make_moe("fused_select", experts=experts).eval()
        swapped.load_state_dict(model.state_dict())
        torch.testing.assert_close(loss(swapped, held_out), loss(model, held_out), rtol=1e-5, atol=1e-6)


def test_a_router_can_be_any_function_of_the_sizes():
    model = make_moe(router=lambda d, e, k: ROUTERS["sinkhorn"](d, e, k, iterations=3))
    assert [layer.router.iterations for layer in model.moe_layers] == [3, 3]
    assert model.moe_layers[0].router is not model.moe_layers[1].router
