"""Sinkhorn among padding, and begun where the last pass ended."""

import pytest
import torch

from moe_lightning.routers import Sinkhorn, Tokens

D, E, K, T = 16, 8, 2, 512


def skewed(**kwargs) -> Sinkhorn:
    """Whose logits favour expert 0 by far."""
    return Sinkhorn(D, E, K, skew_experts=1, skew_bias=4.0, **kwargs).train()


def imbalance(router: Sinkhorn, x_TD: torch.Tensor) -> float:
    counts_E = router(x_TD).selection.tokens_per_expert_E.double()
    return float(counts_E.max() / counts_E.mean() - 1)


def test_padding_neither_balances_nor_is_balanced():
    router = skewed(iterations=20)
    x_TD, mask_T = torch.randn(T, D), torch.rand(T) < 0.6
    x_TD[~mask_T] *= 100.0
    padded = router(x_TD, Tokens(mask_T=mask_T)).selection
    alone = router(x_TD[mask_T]).selection
    assert torch.equal(padded.expert_ids_TK[mask_T], alone.expert_ids_TK)
    torch.testing.assert_close(padded.weights_TK[mask_T], alone.weights_TK)
    assert torch.equal(padded.tokens_per_expert_E, alone.tokens_per_expert_E)
    plain = router.eval()(x_TD).selection
    assert torch.equal(padded.expert_ids_TK[~mask_T], plain.expert_ids_TK[~mask_T])
    assert padded.invalid_rows == 0


def test_warm_started_one_iteration_balances_as_many_do():
    routers = [Sinkhorn(D, E, K, temperature=0.3, iterations=1, warm_start=True).train()]
    routers += [Sinkhorn(D, E, K, temperature=0.3, iterations=n).train() for n in (1, 100)]
    weight_ED = torch.randn(E, D) * 0.4
    for router in routers:
        router.weight.data.copy_(weight_ED)
    for _ in range(30):
        imbalance(routers[0], torch.randn(T, D) + 1)
    x_TD = torch.randn(T, D) + 1
    warm, cold, many = (imbalance(router, x_TD) for router in routers)
    assert cold > many + 0.3
    assert warm < many + 0.1


def test_potentials_are_those_at_which_the_columns_are_balanced():
    router = skewed(iterations=50, warm_start=True, temperature=0.7)
    x_TD = torch.randn(T, D)
    once = router(x_TD).selection
    plan_TE = (router.gate(x_TD) / router.temperature + router.potential_E).softmax(1)
    torch.testing.assert_close(plan_TE.sum(0), torch.full((E,), T / E), rtol=1e-3, atol=1e-3)
    again = router(x_TD).selection
    assert torch.equal(again.expert_ids_TK, once.expert_ids_TK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_say_nothing_leave_the_potentials_finite(bad):
    router = skewed(warm_start=True)
    x_TD = torch.randn(T, D)
    router(x_TD)
    before_E = router.potential_E.clone()
    broken_TD = torch.full_like(x_TD, bad)
    assert router(broken_TD).selection.invalid_rows == T
    assert torch.equal(router.potential_E, before_E)
    broken_TD[5:] = x_TD[5:]
    router(broken_TD)
    assert router.potential_E.isfinite().all()


def test_potentials_are_of_training_and_in_checkpoints():
    router = skewed(warm_start=True)
    x_TD = torch.randn(T, D)
    router.eval()(x_TD)
    with torch.no_grad():
        router.train()(x_TD)
    assert not router.potential_E.any()
    router(x_TD)
    assert router.potential_E.any()
    assert "potential_E" in router.state_dict()
    assert "potential_E" not in skewed().state_dict()  # as in checkpoints of before
