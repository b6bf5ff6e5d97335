"""Every way of making weights, and of ranking by something else than the logits."""

import math
from math import inf, nan

import pytest
import torch
from ops_checks import (
    DEVICES,
    FLOATS,
    SCORES,
    WEIGHTINGS,
    check_bias,
    check_gaps,
    check_ranks,
    check_weight_scaling,
    check_weighting,
    reference_ids,
    views,
)

from moe_lightning.ops import select

IMPLEMENTATIONS = ["native", "torch"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", WEIGHTINGS, ids=str)
def test_weights_and_gradients(how, dtype, implementation, device):
    for experts in (1, 6, 8, 19, 64, 100, 256, 1000):
        for top_k in (1, 3, 8, 32):
            if top_k <= experts:
                check_weighting(torch.randn(33, experts, device=device).to(dtype), top_k, implementation, how)
    for logits_TE in views(dtype, device).values():
        check_weighting(logits_TE, 3, implementation, how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ranks_choose(dtype, implementation, device):
    check_ranks(dtype, device, implementation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", SCORES)
def test_a_bias_on_scores(score, dtype, implementation, device):
    for experts in (20, 48, 100, 200, 300, 900):
        check_bias(score, dtype, device, implementation, experts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", WEIGHTINGS, ids=str)
def test_a_scaling_factor(how, dtype, implementation, device):
    for experts in (6, 64, 200):
        check_weight_scaling(torch.randn(33, experts, device=device).to(dtype), implementation, how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_root_of_softplus(implementation, device):
    low = torch.tensor([[-16.0, -17.5, -40.0, -300.0, -3e38]], dtype=torch.float32, device=device, requires_grad=True)
    weights_TK = select(low, 5, implementation, score="sqrtsoftplus", renormalize=False).weights_TK
    (grad_TE,) = torch.autograd.grad(weights_TK.sum(), low)
    expected = torch.tensor([[math.exp(x / 2) for x in (-16, -17.5, -40, -300)] + [0.0]], device=device)
    torch.testing.assert_close(weights_TK, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_TE, expected / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("experts", "top_k"), [(6, 5), (40, 2), (100, 8), (256, 8), (400, 12), (896, 16), (1024, 32)])
def test_gaps(experts, top_k, score, implementation, device):
    logits_TE = torch.randn(150, experts, device=device)
    logits_TE[[3, 7], [0, 5]], logits_TE[9, :-1] = torch.tensor([nan, inf], device=device), -inf
    options = {"score": score, "bias_E": torch.randn(experts, device=device) / 8}
    check_gaps(logits_TE, top_k, implementation, **options)
    check_gaps(logits_TE, top_k, implementation, **options, mask_T=torch.rand(150, device=device) < 0.6)
    check_gaps(logits_TE.bfloat16(), top_k, implementation, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("experts", "top_k"), [(70, 6), (130, 1), (256, 8), (256, 32), (512, 22), (1000, 16)])
def test_experts_that_tie(experts, top_k, dtype, implementation, device):
    """Equal logits, by the hundred or a few, with a bias or without: the lower id comes first."""
    for levels in (1, 2, 12):
        logits_TE = torch.randint(levels, (150, experts), device=device).to(dtype)
        selection = select(logits_TE, top_k, implementation)
        assert selection.expert_ids_TK.tolist() == reference_ids(logits_TE, top_k).tolist()
        bias_E = torch.zeros(experts, device=device)
        selection = select(-logits_TE, top_k, implementation, score="sigmoid", bias_E=bias_E)
        assert selection.expert_ids_TK.tolist() == reference_ids(-logits_TE, top_k).tolist()
        assert selection.tokens_per_expert_E.sum().item() == 150 * top_k


def groups_by_hand(scores_E: list[float], n_group: int, topk_group: int) -> list[float]:
    """The scores of one token; those outside of its groups are -inf."""
    size = len(scores_E) // n_group
    groups = [scores_E[g * size : (g + 1) * size] for g in range(n_group)]
    sums = [sum(sorted(group, reverse=True)[:2]) for group in groups]
    kept = sorted(range(n_group), key=lambda g: (-sums[g], g))[:topk_group]
    return [x if g in kept else -math.inf for g, group in enumerate(groups) for x in group]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "top_k"),
    [(64, 8, 3, 6), (24, 4, 2, 8), (6, 6, 2, 2), (256, 8, 4, 8), (150, 5, 2, 7), (320, 32, 9, 12), (900, 9, 1, 30)],
)
@pytest.mark.parametrize("score", SCORES)
def test_experts_come_from_the_best_groups(score, experts, n_group, topk_group, top_k, implementation, device):
    # Coarse biases: groups and experts tie, and sums are exact.
    logits_TE = torch.zeros(200, experts, device=device)
    scores_TE = torch.randint(-4, 5, (200, experts), device=device) / 4
    how = {"n_group": n_group, "topk_group": topk_group}
    selection = select(logits_TE, top_k, implementation, score=score, scores_TE=scores_TE, **how)
    kept_TE = torch.tensor([groups_by_hand(row, n_group, topk_group) for row in scores_TE.tolist()])
    assert selection.expert_ids_TK.tolist() == reference_ids(kept_TE, top_k).tolist()
    assert selection.invalid_rows.item() == 0

    logits_TE, bias_E = torch.randn(200, experts, device=device), torch.randn(experts, device=device) / 4
    selection = select(logits_TE, top_k, implementation, score=score, bias_E=bias_E, scaling_factor=2.5, **how)
    scores_TE = SCORES[score](logits_TE.double()) + bias_E.double()
    kept_TE = torch.tensor([groups_by_hand(row, n_group, topk_group) for row in scores_TE.tolist()])
    assert selection.expert_ids_TK.tolist() == reference_ids(kept_TE, top_k).tolist()
    torch.testing.assert_close(selection.weights_TK.sum(1), torch.full((200,), 2.5, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_of_hostile_rows_have_legal_ids(implementation, device):
    logits_TE = torch.randn(6, 8, device=device)
    logits_TE[0, 2], logits_TE[1, 5], logits_TE[2, :7], logits_TE[3, [0, 1, 2, 4, 6]] = nan, inf, -inf, -inf
    logits_TE[4] = -inf
    selection = select(logits_TE, 2, implementation, score="sigmoid", n_group=4, topk_group=1)
    assert all(len(set(row)) == 2 and set(row) <= set(range(8)) for row in selection.expert_ids_TK.tolist())
    # No group of row 3 has two experts left.
    assert selection.weights_TK.isnan().any(1).tolist() == [True, True, True, True, True, False]
    assert selection.invalid_rows.item() == 5


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n_group": 3}, "n_group must divide num_experts, got n_group=3, num_experts=8"),
        ({"n_group": 0}, "n_group must divide"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group must be in \[1, n_group\], got topk_group=5, n_group=4"),
        (
            {"n_group": 8, "topk_group": 1},
            "topk_group groups must hold top_k experts, got topk_group=1, 1 experts in each, top_k=2",
        ),
        ({"mask_T": torch.ones(3, dtype=torch.bool)}, r"mask must be bool of shape \(2,\), got torch.bool \(3,\)"),
        ({"mask_T": torch.ones(2)}, "got torch.float32"),
        (
            {"gap_counts_BE": torch.zeros(8, 8)},
            r"gap_counts must be fp32 of shape \(64, 8\), got torch.float32 \(8, 8\)",
        ),
        ({"gap_counts_BE": torch.zeros(8, 64).T}, "gap_counts must be contiguous"),
        (
            {"gap_counts_BE": torch.zeros(64, 8), "n_group": 4},
            "gaps need an expert that is not selected, and no groups",
        ),
    ],
)
def test_bad_groups_and_masks_are_refused(how, said):
    with pytest.raises(ValueError, match=f"ops.select: .*{said}"):
        select(torch.randn(2, 8), 2, **how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_in_no_load(implementation, device):
    logits_TE = torch.randn(50, 8, device=device)
    logits_TE[[3, 10], 1] = nan
    mask_T = torch.arange(50, device=device) % 3 != 1  # without row 10
    selection, of_all = (select(logits_TE, 2, implementation, mask_T=m) for m in (mask_T, None))
    assert selection.expert_ids_TK.equal(of_all.expert_ids_TK)
    assert selection.weights_TK[~logits_TE.isnan().any(1)].equal(of_all.weights_TK[~logits_TE.isnan().any(1)])
    ids = selection.expert_ids_TK[mask_T].flatten().long()
    assert selection.tokens_per_expert_E.tolist() == torch.bincount(ids, minlength=8).tolist()
    assert (of_all.invalid_rows.item(), selection.invalid_rows.item()) == (2, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", WEIGHTINGS, ids=str)
def test_extreme_logits_stay_finite(how, implementation, device):
    logits_TE = torch.tensor([[3e38, -3e38, 0.0], [-200.0, -200.0, -200.0], [200.0, 200.0, 200.0]], device=device)
    logits_TE.requires_grad_()
    weights_TK = select(logits_TE, 2, implementation, score=how[0], renormalize=how[1]).weights_TK
    (grad_TE,) = torch.autograd.grad(weights_TK.square().sum(), logits_TE)
    assert weights_TK.isfinite().all()
    assert grad_TE.isfinite().all()
