"""Shared and zero experts: against a token at a time, whatever computes the others."""

import pytest
import torch
from moe_reference import assert_same, make_moe, naive_moe, output_and_gradients

from moe_lightning.layers import Experts, MoE, Phase, SharedExperts
from moe_lightning.routers import NaiveTopK


def make_shared(number: int = 1, gated: bool = False) -> SharedExperts:
    """Of weights as the other experts' are drawn."""
    shared = SharedExperts(16, 24 * number, gated=gated)
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return shared


@pytest.mark.parametrize("experts", ["loop", "grouped_mm"])
@pytest.mark.parametrize("router", ["naive_topk", "masked_matmul", "aux_free", "sinkhorn"])
@pytest.mark.parametrize(("n_shared", "gated", "n_zero"), [(1, False, 0), (2, True, 0), (0, False, 3), (1, True, 8)])
def test_against_a_token_at_a_time_in_fp64(router, experts, n_shared, gated, n_zero):
    shared = make_shared(n_shared, gated) if n_shared else None
    moe = make_moe(router, experts, n_zero_experts=n_zero, shared=shared)
    x_TD, grad_TD = torch.randn(33, 16), torch.randn(33, 16)
    actual = output_and_gradients(moe, x_TD, grad_TD)
    moe.zero_grad(set_to_none=True)
    leaf_TD = x_TD.clone().requires_grad_()
    y_TD = naive_moe(leaf_TD, moe)
    y_TD.backward(grad_TD.double())
    expected = {name: p.grad for name, p in moe.named_parameters() if p.requires_grad}
    assert y_TD.abs().mean() > 1e-3
    assert_same(actual, {"output": y_TD.detach(), "input": leaf_TD.grad, **expected}, rtol=1e-4, atol=1e-5)


def test_zero_experts_are_in_the_load_and_get_no_rows():
    moe = make_moe(n_zero_experts=8)
    seen = []
    moe.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    _, routing = moe(torch.randn(50, 16))
    ids_TK, counts_E = routing.selection.expert_ids_TK, routing.selection.tokens_per_expert_E
    assert counts_E.tolist() == torch.bincount(ids_TK.flatten(), minlength=16).tolist()
    [offsets] = seen
    assert offsets[-1] == (ids_TK < 8).sum() < ids_TK.numel()
    assert offsets.diff().tolist() == counts_E[:8].tolist()


def test_a_token_of_zero_experts_alone_is_itself_times_its_weights():
    moe = make_moe(n_zero_experts=2, score="sigmoid", renormalize=False, router="topk")
    with torch.no_grad():
        moe.router.weight[:8] = -10.0
        moe.router.weight[8:] = 1.0
    x_TD = torch.rand(5, 16)
    y_TD, routing = moe(x_TD)
    assert routing.selection.expert_ids_TK.min() == 8
    torch.testing.assert_close(y_TD, routing.selection.weights_TK.sum(1, keepdim=True) * x_TD)


@pytest.mark.parametrize("row", [float("nan"), float("inf")])
def test_an_invalid_row_is_nan_and_leaves_others_alone(row):
    moe = make_moe(n_zero_experts=4, shared=make_shared())
    x_TD = torch.randn(9, 16)
    expected, _ = moe(x_TD)
    x_TD[3, 0] = row
    y_TD, routing = moe(x_TD)
    assert routing.selection.invalid_rows == 1
    assert y_TD[3].isnan().all()
    others = torch.arange(9) != 3
    torch.testing.assert_close(y_TD[others], expected[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0])
def test_capacity_is_of_all_choices(capacity_factor):
    moe = make_moe(n_zero_experts=8, capacity_factor=capacity_factor, shared=make_shared()).train()
    y_TD, routing = moe(torch.randn(64, 16))
    assert routing.selection.tokens_per_expert_E.max() <= capacity_factor * 64 * 2 / 16
    assert y_TD.isfinite().all()


def test_recomputed_it_is_the_same():
    moe = make_moe(n_zero_experts=3, shared=make_shared(gated=True)).train()
    x_TD, grad_TD = torch.randn(33, 16), torch.randn(33, 16)
    expected = output_and_gradients(moe, x_TD, grad_TD)
    moe.recompute = True
    assert_same(output_and_gradients(moe, x_TD, grad_TD), expected, rtol=0, atol=0)


def test_steps_are_those_of_the_layer():
    moe = make_moe(n_zero_experts=3)
    x_TD = torch.randn(33, 16)
    y_TD, routing = moe(x_TD)
    combine = moe.steps(x_TD)[Phase.UNPACK]
    weights_T1 = torch.where(routing.selection.expert_ids_TK >= 8, routing.selection.weights_TK, 0.0).sum(
        1, keepdim=True
    )
    torch.testing.assert_close(combine.call(*combine.inputs) + weights_T1 * x_TD, y_TD)


def test_parameters_that_are_idle():
    assert make_moe().inactive_parameters == 3 * 16 * 24 * 6
    assert make_moe(n_zero_experts=8).inactive_parameters == 3 * 16 * 24 * 8 * 14 // 16


def test_there_must_be_an_expert_that_computes():
    with pytest.raises(ValueError, match=r"moe: num_experts must be .* got num_experts=0"):
        MoE(NaiveTopK(16, 8, 2), Experts(16, 24, 8), n_zero_experts=8)
