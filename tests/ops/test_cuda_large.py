"""Matrices of more than 2^31 elements: 64 bit addresses to the last row."""

import pytest
import torch
from ops_checks import NEEDS_GPU, check_select

from moe_lightning.ops import build_index, permute, select, sinkhorn, unpermute

GIB = 2**30


def _memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


pytestmark = [*NEEDS_GPU, pytest.mark.skipif(_memory() < 60 * GIB, reason="needs a device with 60 GiB of memory")]


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    torch.cuda.empty_cache()


def test_select():
    tokens = 2**31 // 64 + 1001
    logits_TE = torch.randn(tokens, 64, dtype=torch.float16, device="cuda")
    selection = select(logits_TE, 2, "native")
    assert selection.tokens_per_expert_E.sum(dtype=torch.int64).item() == 2 * tokens
    assert torch.equal(
        selection.tokens_per_expert_E, torch.bincount(selection.expert_ids_TK.flatten(), minlength=64).int()
    )
    tail = check_select(logits_TE[-1001:], 2, "native")
    assert torch.equal(selection.expert_ids_TK[-1001:], tail.expert_ids_TK)
    assert torch.equal(selection.weights_TK[-1001:], tail.weights_TK)


def test_movement():
    tokens, width = 2**31 // 4096 + 1001, 4096
    x_TD = torch.randn(tokens, width, dtype=torch.float16, device="cuda")
    ids_TK = torch.randint(8, (tokens, 2), device="cuda").int()
    index = build_index(ids_TK, 8)
    rows_ND = permute(x_TD, index, 2)
    tail = index.inverse_perm_N[-2002:].view(-1, 2).long()
    for k in range(2):
        assert torch.equal(rows_ND[tail[:, k]], x_TD[-1001:])
    y_TD = unpermute(rows_ND, torch.full((tokens, 2), 0.5, device="cuda"), index)
    assert torch.equal(y_TD[-1001:], x_TD[-1001:])


def test_sinkhorn():
    tokens = 2**31 // 64 + 1001
    logits_TE = torch.randn(tokens, 64, dtype=torch.float16, device="cuda")
    scores_TE = sinkhorn(logits_TE, 3)
    plan_TE = scores_TE[-1001:].exp()
    assert (plan_TE.sum(1) - 1).abs().max().item() < 1e-4
    load_E = torch.zeros(64, dtype=torch.float64, device="cuda")
    for rows_TE in scores_TE.split(2**22):
        load_E += rows_TE.exp().sum(0, dtype=torch.float64)
    assert (load_E / (tokens / 64) - 1).abs().max().item() < 0.05
