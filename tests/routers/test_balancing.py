"""Routers that a bias balances: updates by hand, over micro-batches and padding, and what they come to in the end."""

import pytest
import torch
from torch import nn

from moe_lightning.routers import AuxFree, Quantile, Tokens, update_biases

LOADS = [[9, 1, 1, 1], [3, 3, 3, 3], [1, 5, 4, 2]]


def logits_of(load: list[int]) -> torch.Tensor:
    """Of as many tokens as the load sums to, each of which takes one expert by far."""
    experts = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))
    return 8 * nn.functional.one_hot(experts, len(load)).float()


@pytest.mark.parametrize(
    ("update", "expected"),
    [("sign", [-0.1, 0.1, 0.1, 0.1]), ("proportional", [-0.2, 0.1 * 1 / 5, 0.1 * 2 / 5, 0.1 * 7 / 5])],
)
def test_the_bias_follows_the_load_of_all_micro_batches(update, expected):
    router = AuxFree(16, 4, 1, bias_rate=0.1, bias_update=update, renormalize=False)
    router(torch.randn(5, 16))
    update_biases(router)
    router.bias_E.zero_()
    for load in ([9, 1, 1, 0], [6, 3, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]) if update == "sign" else ([10, 4, 3, 3],):
        router.select(logits_of(load))
    if update == "proportional":  # mean 5
        expected = [0.1 * (5 - load) / 5 for load in (10, 4, 3, 3)]
    update_biases(router)
    assert router.bias_E.tolist() == pytest.approx(expected)
    update_biases(router)  # nothing new was gathered
    assert router.bias_E.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", [AuxFree, Quantile])
def test_nothing_is_gathered_in_evaluation_nor_without_gradients(kind):
    router = kind(16, 8, 2).eval()
    router(torch.randn(50, 16))
    with torch.no_grad():
        router.train()(torch.randn(50, 16))
    update_biases(nn.ModuleList([router]))
    assert router.bias_E.eq(0).all()
    router(torch.randn(50, 16))
    update_biases(nn.ModuleList([router]))
    assert router.bias_E.ne(0).any()


@pytest.mark.parametrize("kind", [AuxFree, Quantile])
def test_the_bias_chooses_and_makes_no_weights(kind):
    router = kind(16, 8, 2)
    logits_TE = torch.randn(40, 8)
    router.bias_E.copy_(torch.tensor([0.0, 0, 5, 0, 0, 0, 5, 0]))
    selection = router.select(logits_TE)
    assert all(set(row) == {2, 6} for row in selection.expert_ids_TK.tolist())
    chosen_TK = logits_TE.sigmoid().gather(1, selection.expert_ids_TK.long())
    torch.testing.assert_close(selection.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", [AuxFree, Quantile])
def test_padding_moves_no_bias(kind):
    torch.manual_seed(0)
    plain, padded = kind(16, 8, 2), kind(16, 8, 2)
    logits_TE = torch.randn(60, 8)
    mask_T = torch.rand(60) < 0.7
    plain.select(logits_TE[mask_T])
    padded.select(logits_TE, Tokens(mask_T=mask_T))
    update_biases(plain)
    update_biases(padded)
    assert padded.bias_E.equal(plain.bias_E)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_quantile_is_the_exact_one_to_a_bin(score):
    torch.manual_seed(1)
    router = Quantile(16, 8, 2, score=score)
    logits_TE = torch.randn(4000, 8) + torch.linspace(-1, 1, 8)
    for _ in range(3):  # from bins that are wide to those around 0
        before_E = router.bias_E.clone()
        for part in logits_TE.chunk(3):
            router.select(part)
        update_biases(router)
    scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(1)
    scores_TE = scores_TE + before_E
    cutoff_T1 = scores_TE.sort(1, descending=True).values[:, 2:3]
    exact_E = (cutoff_T1 - scores_TE).quantile(2 / 8, dim=0)
    exact_E = before_E + exact_E
    torch.testing.assert_close(router.bias_E, exact_E - exact_E.mean(), rtol=0, atol=0.004)
    assert router.bias_E.mean().abs() < 1e-6


@pytest.mark.parametrize(("kind", "steps", "options"), [(AuxFree, 400, {"bias_rate": 0.003}), (Quantile, 8, {})])
def test_a_skewed_load_becomes_even(kind, steps, options):
    torch.manual_seed(2)
    router = kind(16, 16, 2, **options)
    logits_TE = torch.randn(4096, 16) + torch.linspace(-1, 1, 16)
    before = router.select(logits_TE).tokens_per_expert_E
    for _ in range(steps):
        after = router.select(logits_TE).tokens_per_expert_E
        update_biases(router)
    mean = 4096 * 2 / 16
    assert before.max() > 2 * mean
    assert after.max() < 1.1 * mean
    assert after.min() > 0.9 * mean


def test_all_experts_of_a_token_leave_a_quantile_nothing_to_do():
    router = Quantile(16, 4, 4)
    router.select(torch.randn(10, 4))
    update_biases(router)
    assert router.bias_E.eq(0).all()


def test_the_bias_is_in_the_state_and_what_was_gathered_is_not():
    router = AuxFree(16, 8, 2)
    router(torch.randn(50, 16))
    update_biases(router)
    assert set(router.state_dict()) == {"weight", "bias_E"}
    other = AuxFree(16, 8, 2)
    other.load_state_dict(router.state_dict())
    assert other.bias_E.equal(router.bias_E)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AuxFree(16, 8, 2, bias_rate=0.0), "bias_rate must be positive and finite, got bias_rate=0.0"),
        (lambda: AuxFree(16, 8, 2, bias_update="signs"), "did you mean sign"),
        (lambda: AuxFree(16, 8, 2, score_after_choice=True), "a bias is added to the scores of all experts"),
        (lambda: AuxFree(16, 8, 2, n_group=3), "n_group must divide num_experts"),
        (lambda: Quantile(16, 8, 2, n_group=4, topk_group=2), "quantile has no groups"),
        (lambda: Quantile(16, 8, 2, bias_decay=1.0), r"bias_decay must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(make, said):
    with pytest.raises(ValueError, match=f"^router: .*{said}"):
        make()
