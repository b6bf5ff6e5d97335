"""Row 14 through the whole layer: a dropped slot adds exactly 0, forward and backward, however rows move."""

import pytest
import torch
from moe_reference import assert_same, make_moe, naive_moe, output_and_gradients

from moe_lightning.layers import Experts, MoE
from moe_lightning.ops import Selection
from moe_lightning.routers import Router, Tokens

MOVEMENTS = {"naive_topk": "permute", "masked_matmul": "masked"}
movements = pytest.mark.parametrize("router", list(MOVEMENTS), ids=MOVEMENTS.get)
implementations = pytest.mark.parametrize("experts", ["loop", "grouped_mm"])


@movements
@implementations
def test_against_a_token_at_a_time(router, experts):
    moe = make_moe(router, experts, capacity_factor=0.5).train()
    x_TD, grad_TD = torch.randn(40, 16), torch.randn(40, 16)
    assert moe.router(x_TD).selection.expert_ids_TK.eq(-1).any()
    actual = output_and_gradients(moe, x_TD, grad_TD)
    moe.zero_grad(set_to_none=True)
    leaf_TD = x_TD.clone().requires_grad_()
    y_TD = naive_moe(leaf_TD, moe)
    y_TD.backward(grad_TD.double())
    gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
    assert_same(actual, {"output": y_TD.detach(), "input": leaf_TD.grad, **gradients}, rtol=1e-4, atol=1e-5)


@movements
@implementations
def test_a_token_that_lost_all_its_experts_gives_exactly_zero(router, experts):
    moe = make_moe(router, experts, top_k=1, skew_experts=1, skew_bias=1e3, capacity_factor=0.8).train()
    x_TD = torch.randn(40, 16)
    lost_T = moe.router(x_TD).selection.expert_ids_TK[:, 0] < 0
    assert lost_T.sum().item() == 36  # ceil(0.8 * 40 / 8) = 4 stay
    result = output_and_gradients(moe, x_TD, torch.randn(40, 16))
    assert result["output"][lost_T].eq(0).all()
    assert result["input"][lost_T].eq(0).all()
    assert (result["output"][~lost_T] != 0).any(1).all()


class Scripted(Router):
    """Sends token t where it is told."""

    def select_experts(self, logits_TE: torch.Tensor, tokens: Tokens) -> Selection:
        ids_TK = self.ids_TK.int()
        counts = torch.bincount(ids_TK[ids_TK >= 0], minlength=self.num_experts).int()
        weights_TK = logits_TE.softmax(1).gather(1, ids_TK.clamp(min=0).long()).masked_fill(ids_TK < 0, 0)
        return Selection(weights_TK, ids_TK, counts, torch.zeros((), dtype=torch.int32))


@pytest.mark.parametrize("movement", ["permute", "masked"])
@implementations
def test_scripted_drops_reach_only_the_experts_that_kept_a_slot(movement, experts):
    router = Scripted(16, 4, 2, capacity_factor=9.0)
    router.dispatch_mode = movement
    router.ids_TK = torch.tensor([[0, 1], [-1, -1], [3, -1]])
    router.select = router.select_experts
    moe = MoE(router, Experts(16, 24, 4, "swiglu", experts))
    result = output_and_gradients(moe, torch.randn(3, 16), torch.randn(3, 16))
    assert result["output"][1].eq(0).all()
    assert result["input"][1].eq(0).all()
    assert result["experts.up"][2].eq(0).all()
    assert result["experts.up"][[0, 1, 3]].abs().amax((1, 2)).gt(0).all()


@implementations
def test_garbage_in_the_rows_of_dropped_slots_is_never_read(experts):
    """grouped_mm leaves rows behind the last offset as it found them, forward and backward: here, full of NaN."""

    def soil(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        behind_N = torch.arange(len(rows)) >= offsets[-1]
        assert behind_N.any()
        return rows.masked_fill(behind_N[:, None], torch.nan)

    moe = make_moe("naive_topk", experts, capacity_factor=0.5).train()
    x_TD, grad_TD = torch.randn(40, 16), torch.randn(40, 16)
    clean = output_and_gradients(moe, x_TD, grad_TD)
    moe.experts.register_forward_pre_hook(
        lambda _, args: args[0].register_hook(lambda gradient: soil(gradient, args[1])) and None
    )
    moe.experts.register_forward_hook(lambda _, args, rows: soil(rows, args[1]))
    soiled = output_and_gradients(moe, x_TD, grad_TD)
    assert all(soiled[name].equal(clean[name]) for name in clean)
