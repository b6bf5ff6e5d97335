"""The routing index: literal cases, dropped slots, and the counting invariants."""

import pytest
import torch
from ops_checks import check_index

from moe_lightning.ops import build_index, select

both = pytest.mark.parametrize("implementation", ["native", "torch"])


@both
def test_literal(implementation):
    ids_TK = torch.tensor([[2, 0], [0, 3], [2, 0]], dtype=torch.int32)
    index = build_index(ids_TK, 4, implementation)
    assert index.expert_offsets.tolist() == [0, 3, 3, 5, 6]
    assert index.perm_N.tolist() == [1, 2, 5, 0, 4, 3]
    assert index.inverse_perm_N.tolist() == [3, 0, 1, 5, 4, 2]


@both
def test_literal_with_dropped_slots(implementation):
    ids_TK = torch.tensor([[1, -1], [7, 0], [-1, 1]], dtype=torch.int32)
    index = build_index(ids_TK, 2, implementation)
    assert index.expert_offsets.tolist() == [0, 1, 3]
    assert index.perm_N.tolist() == [3, 0, 5, 1, 2, 4]  # the tail keeps slot order
    assert index.inverse_perm_N.tolist() == [1, 3, 4, 0, 5, 2]


@both
@pytest.mark.parametrize("experts", [1, 2, 7, 64, 1000, 1024])
@pytest.mark.parametrize("tokens", [0, 1, 33, 5000])
def test_against_a_stable_sort(experts, tokens, implementation):
    for top_k in (1, 2, 8):
        check_index(torch.randint(experts, (tokens, top_k)).int(), experts, implementation)


@both
@pytest.mark.parametrize("stray", [-1, 8, 2**31 - 1, -(2**31)])
def test_ids_outside_the_range_are_dropped(stray, implementation):
    ids_TK = torch.randint(8, (500, 2)).int()
    ids_TK[torch.rand(500, 2) < 0.3] = stray
    check_index(ids_TK, 8, implementation)
    assert check_index(torch.full_like(ids_TK, stray), 8, implementation).expert_offsets[-1].item() == 0


@both
def test_all_to_one_expert_and_non_contiguous_ids(implementation):
    check_index(torch.full((300, 2), 5, dtype=torch.int32), 64, implementation)
    check_index(torch.randint(64, (2, 300)).int().t(), 64, implementation)
    check_index(torch.randint(64, (300, 9)).int()[:, ::3], 64, implementation)


@both
def test_agrees_with_the_counts_of_select(implementation):
    selection = select(torch.randn(777, 48), 4, implementation)
    offsets = build_index(selection.expert_ids_TK, 48, implementation).expert_offsets
    assert torch.equal(offsets.diff(), selection.tokens_per_expert_E)
    assert offsets[0] == 0
    assert offsets[-1] == 777 * 4


def test_compiles_whole():
    compiled = torch.compile(build_index, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        ids_TK = torch.randint(6, (tokens, 2)).int()
        assert all(torch.equal(a, b) for a, b in zip(compiled(ids_TK, 6), build_index(ids_TK, 6), strict=True))
