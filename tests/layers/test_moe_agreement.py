"""Every router, movement and expert implementation computes the same layer."""

import pytest
import torch
from moe_reference import assert_same, make_moe, naive_moe, output_and_gradients

from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.dispatch import MaskedDispatcher, PermuteDispatcher
from moe_lightning.routers import ROUTERS

IMPLEMENTATIONS = ("loop", "grouped_mm", "auto")


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("router", list(ROUTERS))
def test_against_a_token_at_a_time_in_fp64(router, experts, activation):
    moe = make_moe(router, experts, activation=activation)
    x_TD, grad_TD = torch.randn(33, 16), torch.randn(33, 16)
    actual = output_and_gradients(moe, x_TD, grad_TD)

    moe.zero_grad(set_to_none=True)
    leaf_TD = x_TD.clone().requires_grad_()
    y_TD = naive_moe(leaf_TD, moe)
    y_TD.backward(grad_TD.double())
    expected = {name: p.grad for name, p in moe.named_parameters() if p.requires_grad}
    assert y_TD.abs().mean() > 1e-3
    assert_same(actual, {"output": y_TD.detach(), "input": leaf_TD.grad, **expected}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("movement", ["permute", "masked"])
@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
def test_movements_agree(movement, experts, capacity_factor):
    reference = make_moe("naive_topk", "loop", capacity_factor=capacity_factor)
    moe = make_moe("naive_topk", experts, capacity_factor=capacity_factor)
    moe.load_state_dict(reference.state_dict())
    may_drop = capacity_factor is not None
    moe.dispatcher = PermuteDispatcher(8, 2, may_drop) if movement == "permute" else MaskedDispatcher(8)
    x_TD, grad_TD = torch.randn(50, 16), torch.randn(50, 16)
    expected = output_and_gradients(reference, x_TD, grad_TD)
    assert_same(output_and_gradients(moe, x_TD, grad_TD), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("router", ["naive_topk", "masked_matmul"])
def test_bf16_autocast_stays_near_fp32_and_gradients_stay_fp32(router, experts):
    moe = make_moe(router, experts)
    x_TD, grad_TD = torch.randn(64, 16), torch.randn(64, 16)
    exact = output_and_gradients(moe, x_TD, grad_TD)
    with torch.autocast("cpu", torch.bfloat16):
        half = output_and_gradients(moe, x_TD, grad_TD)
    assert all(half[name].dtype == torch.float32 for name in half if name != "output")
    assert half["output"].dtype == torch.bfloat16
    for name, value in exact.items():
        error = (half[name].float() - value).norm() / value.norm()
        assert 0 < error < 0.02, name


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "hash"])  # which a skew does not move
def test_empty_experts_have_gradient_exactly_zero(router):
    for experts in IMPLEMENTATIONS:
        moe = make_moe(router, experts, skew_experts=3, skew_bias=1e3)
        gradients = output_and_gradients(moe, torch.randn(20, 16), torch.randn(20, 16))
        for name in ("experts.up", "experts.down"):
            per_expert_E = gradients[name].abs().amax((1, 2))
            assert per_expert_E[3:].tolist() == [0.0] * 5
            assert per_expert_E[:3].sum() > 0


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("router", list(ROUTERS))
def test_no_tokens(router, experts):
    moe = make_moe(router, experts)
    gradients = output_and_gradients(moe, torch.empty(0, 16), torch.empty(0, 16))
    assert gradients.pop("output").shape == gradients.pop("input").shape == (0, 16)
    assert all(gradient.eq(0).all() for gradient in gradients.values())


@pytest.mark.parametrize("router", list(ROUTERS))
def test_one_expert_is_a_dense_layer(router):
    options = {"score": "softmax"} if router == "expert_threshold" else {}
    moe = make_moe(router, "loop", num_experts=1, top_k=1, **options)
    x_TD = torch.randn(9, 16)
    gate, up = (x_TD @ moe.experts.up[0].T).chunk(2, 1)
    torch.testing.assert_close(moe(x_TD)[0], (torch.nn.functional.silu(gate) * up) @ moe.experts.down[0].T)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_leading_dimensions_and_strides_do_not_matter(router):
    moe = make_moe(router)
    x_BSD = torch.randn(3, 5, 16)
    y_TD, routing = moe(x_BSD.view(15, 16))
    assert moe(x_BSD)[0].view(15, 16).equal(y_TD)
    strided = x_BSD.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(moe(strided)[0].reshape(15, 16), y_TD)
    assert routing.logits_TE.equal(moe.router.gate(x_BSD.view(15, 16)))
    loads = {"expert_choice": 8 * 4}  # ceil(15 * 2 / 8) of each expert, less what a token may have at most
    assert routing.selection.tokens_per_expert_E.sum() <= loads.get(router, 30)
    assert routing.selection.tokens_per_expert_E.sum() >= 30 - (router in loads)


def test_idle_weights_are_those_of_the_experts_not_met():
    moe = MoE(ROUTERS["naive_topk"](16, 8, 3), Experts(16, 24, 8))
    assert moe.inactive_parameters == 5 * (2 * 24 * 16 + 16 * 24)
