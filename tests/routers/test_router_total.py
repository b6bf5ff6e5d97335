"""Rows 3, 4, 5, 8, 9, 17: any input bits, any size, in training and in evaluation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_reference import (
    FROZEN_ROUTERS,
    SIGMOID_ROUTERS,
    UNRANKED_ROUTERS,
    VARYING_ROUTERS,
    both_modes,
    check_legal,
    every_router,
    make,
    naive_ids,
    naive_weights,
    ranked_router,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lightning.routers import ROUTERS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INF = math.inf


@pytest.mark.parametrize("bad", [math.nan, INF], ids=["nan", "inf"])
@both_modes
@every_router
def test_bad_logits_give_legal_ids_nan_weights_and_a_count(name, training, bad):
    for rows, columns, expected in (((1,), (3,), 1), ((2,), range(8), 1), (range(5), range(8), 5), ((0, 4), (0, 7), 2)):
        logits_TE = torch.randn(5, 8)
        for row in rows:
            logits_TE[row, list(columns)] = bad
        selection = make(name, 8, 3, training).select(logits_TE)
        assert selection.invalid_rows.item() == expected
        check_legal(selection, logits_TE, 3, name)


@both_modes
@pytest.mark.parametrize("name", [name for name in ROUTERS if not ROUTERS[name].looks_ahead])
def test_a_bad_row_leaves_the_others_alone(name, training):
    router = make(name, 8, 2, training)
    logits_TE = torch.randn(6, 8)
    spoilt_TE = torch.cat([logits_TE, torch.full((1, 8), math.nan)])
    clean, spoilt = router.select(logits_TE), router.select(spoilt_TE)
    assert spoilt.expert_ids_TK[:6].equal(clean.expert_ids_TK)
    assert spoilt.weights_TK[:6].equal(clean.weights_TK)


@both_modes
@ranked_router
def test_nan_poisons_the_gradient_of_its_own_row_only(name, training):
    logits_TE = torch.randn(3, 8)
    logits_TE[1, 4] = math.nan
    logits_TE.requires_grad_()
    make(name, 8, 2, training).select(logits_TE).weights_TK.square().sum().backward()
    assert logits_TE.grad[1].isnan().any()
    assert not logits_TE.grad[[0, 2]].isnan().any()


@both_modes
@every_router
def test_all_but_k_experts_masked_is_legal_and_one_more_is_not(name, training):
    logits_TE = torch.randn(4, 8)
    logits_TE[0, [0, 2, 3, 4, 6]] = -INF  # three left: legal
    logits_TE[2, [0, 2, 3, 4, 6, 7]] = -INF  # two left: invalid
    selection = make(name, 8, 3, training).select(logits_TE)
    check_legal(selection, logits_TE, 3, name)
    assert selection.invalid_rows.item() == 1
    assert set(selection.expert_ids_TK[0].tolist()) - {-1} <= {1, 5, 7}
    if name not in VARYING_ROUTERS:
        assert len(set(selection.expert_ids_TK[0].tolist())) == 3
    assert (selection.weights_TK[0] > 0).equal(selection.expert_ids_TK[0] >= 0)


@both_modes
@every_router
def test_an_expert_masked_for_all_is_never_taken(name, training):
    logits_TE = torch.randn(40, 6)
    logits_TE[:, [1, 4]] = -INF
    load_E = make(name, 6, 2, training).select(logits_TE).tokens_per_expert_E
    assert load_E[[1, 4]].tolist() == [0, 0]
    # Of four experts that take ceil(40 * 2 / 6) each, what they can.
    assert load_E.sum().item() == (56 if name == "expert_choice" else 80)


@both_modes
@every_router
def test_a_huge_logit_does_not_turn_finite_experts_into_masked_ones(name, training):
    logits_TE = torch.tensor([[3e38, -INF, -3e38, -3e38]])
    selection = make(name, 4, 2, training).select(logits_TE)
    check_legal(selection, logits_TE, 2, name)
    assert 1 not in selection.expert_ids_TK


@both_modes
@every_router
def test_no_tokens_forward_and_backward(name, training):
    router = make(name, 8, 2, training)
    x_TD = torch.empty(0, 16, requires_grad=True)
    selection = router(x_TD).selection
    assert selection.weights_TK.shape == selection.expert_ids_TK.shape == (0, router.slots)
    assert selection.tokens_per_expert_E.tolist() == [0] * 8
    assert selection.invalid_rows.item() == 0
    selection.weights_TK.sum().backward()
    assert x_TD.grad.shape == (0, 16)
    assert router.weight.grad is None if name in FROZEN_ROUTERS else router.weight.grad.equal(torch.zeros(8, 16))


@both_modes
@every_router
def test_one_token_one_expert_has_weight_exactly_one(name, training):
    options = {"score": "softmax"} if name == "expert_threshold" else {}
    selection = make(name, 1, 1, training, **options).select(torch.tensor([[-7.3]]))
    assert selection.weights_TK.tolist() == [[1.0]]
    assert selection.expert_ids_TK.tolist() == [[0]]
    assert selection.tokens_per_expert_E.tolist() == [1]


@both_modes
@every_router
def test_all_experts_chosen(name, training):
    logits_TE = torch.randn(7, 6)
    selection = make(name, 6, 6, training).select(logits_TE)
    check_legal(selection, logits_TE, 6, name)
    weights_TE = torch.zeros(7, 6).scatter(1, selection.expert_ids_TK.long(), selection.weights_TK)
    if name in VARYING_ROUTERS:
        expected = (logits_TE.softmax(1) if name == "expert_choice" else logits_TE.sigmoid()).tolist()
    else:
        expected = (
            [[1 / 6] * 6] * 7 if name == "hash" else naive_weights(logits_TE, [list(range(6))] * 7, name).tolist()
        )
    torch.testing.assert_close(weights_TE, torch.tensor(expected))


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@both_modes
@every_router
def test_nothing_reads_the_device(name, training, capacity_factor):
    """A fake tensor has no values: whatever asks for one (item, tolist, nonzero) raises."""
    with FakeTensorMode():
        router = make(name, 8, 2, training, capacity_factor=capacity_factor)
        routing = router(torch.randn(5, 16, requires_grad=True))
        routing.selection.weights_TK.sum().backward()
        assert name in FROZEN_ROUTERS or router.weight.grad.shape == (8, 16)


@st.composite
def any_logits(draw) -> tuple[torch.Tensor, int]:
    """Random sizes and dtype, with NaN, infinities, ties, signed zeros and the largest numbers sprinkled in."""
    tokens, experts = draw(st.integers(0, 9)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits_TE = (torch.randn(tokens, experts, generator=generator) * draw(st.sampled_from([0.0, 1.0, 100.0]))).to(dtype)
    largest = torch.finfo(dtype).max
    for _ in range(draw(st.integers(0, 12)) if tokens else 0):
        where = draw(st.integers(0, tokens - 1)), draw(st.integers(0, experts - 1))
        logits_TE[where] = draw(st.sampled_from([math.nan, INF, -INF, 0.0, -0.0, 1.0, largest, -largest]))
    return logits_TE, draw(st.integers(1, min(experts, 8)))


@settings(max_examples=120)
@given(case=any_logits())
@both_modes
@every_router
def test_any_bits(name, training, case):
    logits_TE, top_k = case
    selection = make(name, logits_TE.shape[1], top_k, training).select(logits_TE)
    check_legal(selection, logits_TE, top_k, name)
    if name in (*UNRANKED_ROUTERS, *SIGMOID_ROUTERS):
        return
    if not training:
        assert selection.expert_ids_TK.tolist() == naive_ids(logits_TE, top_k)
    valid_T = ~selection.weights_TK.isnan().any(1)
    weights_TK = naive_weights(logits_TE, selection.expert_ids_TK.tolist()) if len(logits_TE) else torch.empty(0, top_k)
    torch.testing.assert_close(
        selection.weights_TK[valid_T].double(), weights_TK[valid_T].double(), rtol=1e-5, atol=1e-7
    )
