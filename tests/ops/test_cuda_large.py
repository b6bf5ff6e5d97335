"""Matrices of more than 2^31 elements: 64 bit addresses to the last row."""

import pytest
import torch
from ffn_cases import Case, plain, run
from ops_checks import NEEDS_GPU, check_select

from moe_lightning.ops import build_index, permute, select, sinkhorn, unpermute
from moe_lightning.ops.expert_ffn import missing

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


def test_experts():
    """Rows (N, D) and hidden rows (N, G); only the first and last have a gradient, so that torch can follow."""
    if reason := missing(torch.bfloat16, torch.device("cuda", 0), 1024, 1024):
        pytest.skip(reason)
    experts, width, some = 4, 1024, 1001
    count = 2**31 // width + 4 * some
    counts = torch.full((experts,), count // experts)
    counts[-1] += count - int(counts.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int().cuda()
    rows_ND = torch.randn(count, width, dtype=torch.bfloat16, device="cuda")
    up_EGD = torch.randn(experts, 2 * width, width, device="cuda").mul(width**-0.5).bfloat16()
    down_EDF = torch.randn(experts, width, width, device="cuda").mul(width**-0.5).bfloat16()
    perm_N = torch.arange(count, dtype=torch.int32, device="cuda")
    weights_TK = torch.rand(count, 1, device="cuda")
    ends = torch.cat([torch.arange(some), torch.arange(count - some, count)]).cuda()
    upstream_ND = torch.zeros_like(rows_ND)
    upstream_ND[ends] = torch.randn(2 * some, width, dtype=torch.bfloat16, device="cuda")
    whole = Case(rows_ND, up_EGD, down_EDF, weights_TK, offsets, perm_N, perm_N)
    out_ND, grad_ND, grad_up, grad_down, grad_weights = run(whole, "swiglu", True, upstream_ND)

    # The same rows alone: the first expert's first and the last one's last.
    few = torch.tensor([0, *[some] * (experts - 1), 2 * some], dtype=torch.int32, device="cuda")
    small = Case(rows_ND[ends], up_EGD, down_EDF, weights_TK[ends], few, perm_N[: 2 * some], perm_N)
    exact = plain(small, "swiglu", True, upstream_ND[ends])
    theirs = plain(small, "swiglu", True, upstream_ND[ends], torch.bfloat16)
    actual = [out_ND[ends], grad_ND[ends], grad_up, grad_down, grad_weights[ends]]
    for ours, own, right in zip(actual, theirs, exact, strict=True):
        assert (ours.double() - right).norm() <= 2 * (own.double() - right).norm() + 1e-5 * (1 + right.norm())
    between = slice(some, count - some)
    assert not grad_ND[between].any()
    assert not grad_weights[between].any()


def test_a_million_tokens_of_1024_experts_32_each():
    """The contract's largest sizes at once, through select, index, permute and back."""
    tokens, experts, top_k, width = 1_000_000, 1024, 32, 64
    logits_TE = torch.randn(tokens, experts, dtype=torch.bfloat16, device="cuda")
    selection = select(logits_TE, top_k, "native")
    load_E = torch.bincount(selection.expert_ids_TK.flatten(), minlength=experts)
    assert torch.equal(selection.tokens_per_expert_E.long(), load_E)
    assert int(load_E.sum()) == tokens * top_k
    tail = check_select(logits_TE[-1001:], top_k, "native")
    assert torch.equal(selection.expert_ids_TK[-1001:], tail.expert_ids_TK)
    index = build_index(selection.expert_ids_TK, experts)
    assert torch.equal(index.expert_offsets[1:].long(), load_E.cumsum(0))
    by_expert_N = selection.expert_ids_TK.flatten()[index.perm_N.long()]
    assert bool((by_expert_N.diff() >= 0).all())
    same = by_expert_N[1:] == by_expert_N[:-1]
    assert bool((index.perm_N.diff()[same] > 0).all())  # stable
    x_TD = torch.randint(0, 8, (tokens, width), device="cuda").bfloat16()
    y_TD = unpermute(permute(x_TD, index, top_k), torch.full((tokens, top_k), 1 / 32, device="cuda"), index)
    assert torch.equal(y_TD, x_TD)
