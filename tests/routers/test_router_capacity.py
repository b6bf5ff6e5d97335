"""Row 14: a full expert keeps its heaviest slots, drops the rest, and the counts follow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_reference import both_modes, every_router, make, ranked_router


def limit(factor: float, tokens: int, top_k: int, experts: int) -> int:
    return math.ceil(factor * tokens * top_k / experts)


def test_literal_drop():
    # K=2, E=3, T=4: capacity ceil(0.75 * 8 / 3) = 2. All four tokens want expert 0 first or second.
    logits_TE = torch.tensor([[2.0, 0.0, -9.0], [1.0, 0.0, -9.0], [3.0, -9.0, 0.0], [0.0, 1.0, -9.0]])
    selection = make("naive_topk", 3, 2, training=True, capacity_factor=0.75).select(logits_TE)
    assert selection.expert_ids_TK.tolist() == [[0, -1], [-1, 1], [0, 2], [1, -1]]
    assert selection.tokens_per_expert_E.tolist() == [2, 2, 1]
    sigmoid = torch.tensor([1.0, 2.0, 3.0]).sigmoid().tolist()
    expected = [[sigmoid[1], 0], [0, 1 - sigmoid[0]], [sigmoid[2], 1 - sigmoid[2]], [sigmoid[0], 0]]
    torch.testing.assert_close(selection.weights_TK, torch.tensor(expected))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 4),
    factor=st.sampled_from([0.01, 0.25, 0.5, 1.0, 1.5, 2.0]),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 2**31),
)
@every_router
def test_each_expert_keeps_its_heaviest(name, tokens, experts, top_k, factor, levels, seed):
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randint(0, levels, (tokens, experts), generator=generator) / levels * 4
    full = make(name, experts, top_k, training=True).select(logits_TE)
    cut = make(name, experts, top_k, training=True, capacity_factor=factor).select(logits_TE)

    capacity = limit(factor, tokens, top_k, experts)
    weights, wanted = full.weights_TK.flatten().tolist(), full.expert_ids_TK.flatten().tolist()
    kept = set()
    for expert in range(experts):
        slots = [slot for slot, e in enumerate(wanted) if e == expert]
        kept.update(sorted(slots, key=lambda slot: (-weights[slot], slot))[:capacity])
    assert cut.expert_ids_TK.flatten().tolist() == [e if s in kept else -1 for s, e in enumerate(wanted)]
    assert cut.weights_TK.flatten().tolist() == [w if s in kept else 0.0 for s, w in enumerate(weights)]
    ids_N = cut.expert_ids_TK.flatten()
    assert cut.tokens_per_expert_E.tolist() == torch.bincount(ids_N[ids_N >= 0], minlength=experts).tolist()
    assert cut.tokens_per_expert_E.dtype == cut.expert_ids_TK.dtype == torch.int32
    assert cut.invalid_rows.equal(full.invalid_rows)


@ranked_router
def test_a_dropped_slot_has_no_gradient(name):
    logits_TE = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]], requires_grad=True)
    selection = make(name, 2, 2, training=True, capacity_factor=0.5).select(logits_TE)
    dropped_TK = selection.expert_ids_TK < 0
    assert dropped_TK.sum(1).tolist() == [1, 1, 1, 1]
    assert selection.expert_ids_TK.amax(1).tolist() == [0, 0, 1, 1]  # what is kept; sinkhorn orders a row otherwise
    selection.weights_TK[dropped_TK].sum().backward()
    assert logits_TE.grad.equal(torch.zeros(4, 2))


@ranked_router
def test_same_drop_on_every_run_among_equal_weights(name):
    router = make(name, 4, 2, training=True, capacity_factor=0.5)
    ids = router.select(torch.zeros(8, 4)).expert_ids_TK
    assert ids.tolist() == [[0, 1], [0, 1]] + [[-1, -1]] * 6
    assert all(router.select(torch.zeros(8, 4)).expert_ids_TK.equal(ids) for _ in range(100))


@both_modes
@every_router
def test_an_invalid_row_is_still_counted(name, training):
    logits_TE = torch.randn(8, 4)
    logits_TE[3] = math.nan
    selection = make(name, 4, 2, training, capacity_factor=1.0).select(logits_TE)
    assert selection.invalid_rows.item() == 1
    ids_N = selection.expert_ids_TK.flatten()
    assert ((ids_N >= -1) & (ids_N < 4)).all()
    assert selection.tokens_per_expert_E.tolist() == torch.bincount(ids_N[ids_N >= 0], minlength=4).tolist()


@pytest.mark.parametrize("factor", [1e9, 1e12, 1e30, 1e308])
def test_a_huge_factor_drops_nothing(factor):
    logits_TE = torch.randn(16, 4)
    free = make("naive_topk", 4, 2).select(logits_TE)
    limited = make("naive_topk", 4, 2, training=True, capacity_factor=factor).select(logits_TE)
    assert all(torch.equal(a, b) for a, b in zip(free, limited, strict=True))


@every_router
def test_evaluation_drops_nothing(name):
    logits_TE = torch.zeros(9, 4)
    logits_TE[:, 0] = 5.0
    full = make(name, 4, 2).select(logits_TE)
    limited = make(name, 4, 2, capacity_factor=0.1).select(logits_TE)
    assert limited.expert_ids_TK.equal(full.expert_ids_TK)
    assert limited.tokens_per_expert_E.equal(full.tokens_per_expert_E)
