"""Rows 15 and 16 at the router: balanced while training, top-k in evaluation, and it always ends."""

import pytest
import torch
from router_reference import check_legal, make, naive_ids, naive_weights

from moe_lightning.ops import select


def skew(load_E: torch.Tensor) -> float:
    return (load_E.max() / load_E.float().mean()).item()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balances_skewed_logits_in_training(top_k):
    logits_TE = torch.randn(1024, 16)
    logits_TE[:, :4] += 2.0
    balanced = make("sinkhorn", 16, top_k, training=True).select(logits_TE).tokens_per_expert_E
    greedy = select(logits_TE, top_k).tokens_per_expert_E
    assert skew(greedy) > 2.0
    assert skew(balanced) < 1.5
    assert balanced.min() > 0.5 * balanced.float().mean()


def test_no_iteration_count_makes_it_worse_than_one():
    logits_TE = torch.randn(512, 8) + torch.linspace(3, 0, 8)
    loads = [
        skew(make("sinkhorn", 8, 2, training=True, iterations=n).select(logits_TE).tokens_per_expert_E)
        for n in (1, 10, 100)
    ]
    assert loads[1] <= loads[0]
    assert loads[2] < 1.2


def test_weights_are_the_softmax_over_the_raw_logits_it_chose():
    logits_TE = torch.randn(256, 8) + torch.linspace(3, 0, 8)
    selection = make("sinkhorn", 8, 2, training=True).select(logits_TE)
    assert selection.expert_ids_TK.tolist() != naive_ids(logits_TE, 2)
    expected_TK = naive_weights(logits_TE, selection.expert_ids_TK.tolist())
    torch.testing.assert_close(selection.weights_TK.double(), expected_TK, rtol=1e-5, atol=1e-7)


def test_equals_top_k_in_evaluation():
    logits_TE = torch.randn(256, 8) + torch.linspace(3, 0, 8)
    sinkhorn, topk = make("sinkhorn", 8, 2).select(logits_TE), make("fused_select", 8, 2).select(logits_TE)
    assert all(torch.equal(a, b) for a, b in zip(sinkhorn, topk, strict=True))


@pytest.mark.parametrize("std", [1.0, 5.0, 10.0, 40.0])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
def test_few_tokens_and_wide_logits_end_and_are_legal(tokens, std):
    for experts, top_k in ((1, 1), (8, 2), (64, 8)):
        logits_TE = torch.randn(tokens, experts) * std
        check_legal(make("sinkhorn", experts, top_k, training=True).select(logits_TE), logits_TE, top_k)


@pytest.mark.parametrize("value", [89.0, -89.0, 1e4, 3e38])
def test_logits_that_overflow_exp(value):
    logits_TE = torch.zeros(8, 4)
    logits_TE[:, 1] = value
    check_legal(make("sinkhorn", 4, 2, training=True).select(logits_TE), logits_TE, 2)


@pytest.mark.parametrize("temperature", [2e-38, 1e-6, 1e6, 3e38])
def test_any_temperature_ends_legal_and_without_a_collapse(temperature):
    logits_TE = torch.randn(64, 4)
    router = make("sinkhorn", 4, 2, training=True, temperature=temperature)
    selection = router.select(logits_TE)
    check_legal(selection, logits_TE, 2)
    if temperature < 1e10:  # beyond, all scores are equal in fp32, and ties go to the lower id
        assert selection.tokens_per_expert_E.min() > 0


def test_a_low_temperature_stays_closer_to_top_k():
    logits_TE = torch.randn(512, 8) + torch.linspace(1, 0, 8)
    topk_TE = torch.zeros(512, 8).scatter(1, select(logits_TE, 2).expert_ids_TK.long(), 1)
    agreement = []
    for temperature in (0.05, 20.0):
        router = make("sinkhorn", 8, 2, training=True, iterations=2, temperature=temperature)
        agreement.append(topk_TE.gather(1, router.select(logits_TE).expert_ids_TK.long()).mean().item())
    assert agreement[0] > agreement[1]


def test_a_constant_shift_of_a_row_changes_no_id():
    logits_TE = torch.randint(-64, 64, (128, 8)) / 16  # exact in fp32 after the shift
    shift_T1 = torch.randint(-32, 32, (128, 1))
    router = make("sinkhorn", 8, 2, training=True)
    assert router.select(logits_TE).expert_ids_TK.equal(router.select(logits_TE + shift_T1).expert_ids_TK)


def test_same_bits_on_100_runs():
    logits_TE = torch.randn(64, 8)
    router = make("sinkhorn", 8, 2, training=True)
    first = router.select(logits_TE)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, router.select(logits_TE.clone()), strict=True))


def test_the_gradient_reaches_the_gate():
    router = make("sinkhorn", 8, 2, training=True)
    router(torch.randn(32, 16)).selection.weights_TK[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
