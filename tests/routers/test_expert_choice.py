"""Experts that take tokens: what each takes, by hand; thresholds over ranks, micro-batches and steps."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from router_reference import make
from torch import multiprocessing

from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ExpertChoice, ExpertThreshold, Routing, Tokens, sequence_balance_loss, update_biases


def chosen(selection) -> list[set[int]]:
    return [{e for e in row if e >= 0} for row in selection.expert_ids_TK.tolist()]


def choice_by_hand(scores: list[list[float]], top_k: int, most: int, real: list[bool]) -> list[list[int]]:
    """Experts of each token, best first, -1 behind them."""
    tokens, experts = len(scores), len(scores[0])
    capacity = math.ceil(sum(real) * top_k / experts)
    taken = [set() for _ in scores]
    for e in range(experts):
        for t in sorted((t for t in range(tokens) if real[t]), key=lambda t: (-scores[t][e], t))[:capacity]:
            taken[t].add(e)
    rows = [sorted(row, key=lambda e: (-scores[t][e], e))[:most] for t, row in enumerate(taken)]
    return [row + [-1] * (most - len(row)) for row in rows]


@pytest.mark.parametrize("most", [None, 2, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("training", [True, False])
def test_every_expert_takes_its_best_tokens(training, score, masked, most):
    router = make("expert_choice", 6, 2, training, score=score, max_experts_per_token=most)
    logits_TE = torch.randint(0, 5, (23, 6)) / 2  # with ties
    mask_T = torch.arange(23) % 3 != 1 if masked else None
    selection = router.select(logits_TE, Tokens(mask_T=mask_T))
    scores_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    real = [True] * 23 if mask_T is None else mask_T.tolist()
    by_hand = choice_by_hand(scores_TE.tolist(), 2, router.slots, real)
    assert selection.expert_ids_TK.tolist() == by_hand
    ids_TM = selection.expert_ids_TK.long()
    weights_TM = torch.where(ids_TM >= 0, scores_TE.gather(1, ids_TM.clamp(min=0)), 0.0)
    torch.testing.assert_close(selection.weights_TK, weights_TM)
    counts = torch.bincount(ids_TM[ids_TM >= 0], minlength=6)
    assert selection.tokens_per_expert_E.tolist() == counts.tolist()
    if most == 6:  # nothing is cut off
        assert counts.tolist() == [math.ceil(sum(real) * 2 / 6)] * 6


def test_choice_looks_ahead_and_says_so():
    with pytest.warns(UserWarning, match="expert_choice looks at the tokens that follow.*not comparable"):
        router = ExpertChoice(16, 4, 1).eval()
    assert router.looks_ahead
    logits_TE = torch.randn(8, 4)
    better_TE = logits_TE.clone()
    better_TE[7] = logits_TE[0] + 1.0  # of no consequence to a softmax, but that it comes later
    better_TE[7, 0] += 5.0
    first, then = router.select(logits_TE), router.select(better_TE)
    assert not first.expert_ids_TK[:7].equal(then.expert_ids_TK[:7])


def test_thresholds_are_the_quantile_of_all_micro_batches():
    router = ExpertThreshold(16, 8, 2, max_experts_per_token=8)
    logits_TE = torch.randn(6000, 8) + torch.linspace(-1, 1, 8)
    for part in logits_TE.split([1000, 2000, 3000]):
        selection = router.select(part)
        assert chosen(selection) == [set(row) for row in part.topk(2).indices.tolist()]  # not known yet
    update_biases(router)
    exact_E = logits_TE.sigmoid().quantile(1 - 2 / 8, dim=0)
    torch.testing.assert_close(router.threshold_E, exact_E, rtol=0, atol=0.25 * 32 / 1000)
    load_E = router.select(logits_TE).tokens_per_expert_E
    assert load_E.min() > 0.95 * 1500
    assert load_E.max() < 1.05 * 1500
    first_E = router.threshold_E.clone()
    router.gathered.zero_()
    router.select(logits_TE + 2.0)
    update_biases(router)
    moved_E = 0.9 * first_E + 0.1 * (logits_TE + 2.0).sigmoid().quantile(1 - 2 / 8, dim=0)
    torch.testing.assert_close(router.threshold_E, moved_E, rtol=0, atol=1e-3)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_token_has_the_experts_above_their_thresholds_best_first(score):
    router = ExpertThreshold(16, 6, 2, score=score, max_experts_per_token=3).eval()
    router.threshold_E.copy_(torch.linspace(0.1, 0.3, 6) if score == "softmax" else torch.linspace(0.5, 0.8, 6))
    logits_TE = 2 * torch.randn(50, 6)
    scores_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    expected = []
    for row in scores_TE.tolist():
        above = sorted((e for e in range(6) if row[e] > router.threshold_E[e]), key=lambda e: (-row[e], e))[:3]
        expected.append(above + [-1] * (3 - len(above)))
    selection = router.select(logits_TE)
    assert selection.expert_ids_TK.tolist() == expected
    assert [-1, -1, -1] in expected or score == "softmax"
    for number in (0, 17, 49):  # causal: nothing but the token itself
        assert router.select(logits_TE[number : number + 1]).expert_ids_TK.tolist() == [expected[number]]


def test_thresholds_move_in_training_alone_and_are_in_the_state():
    router = ExpertThreshold(16, 8, 2).eval()
    router(torch.randn(50, 16))
    with torch.no_grad():
        router.train()(torch.randn(50, 16))
    update_biases(router)
    assert router.threshold_E.eq(-1).all()
    router(torch.randn(50, 16))
    update_biases(router)
    assert router.threshold_E.gt(0).all()
    assert set(router.state_dict()) == {"weight", "threshold_E"}


def test_padding_moves_no_threshold():
    plain, padded = ExpertThreshold(16, 8, 2), ExpertThreshold(16, 8, 2)
    logits_TE = torch.randn(60, 8)
    mask_T = torch.rand(60) < 0.7
    plain.select(logits_TE[mask_T])
    padded.select(logits_TE, Tokens(mask_T=mask_T))
    update_biases(plain)
    update_biases(padded)
    assert padded.threshold_E.equal(plain.threshold_E)


def test_thresholds_with_the_widest_scores_stay_finite():
    router = ExpertThreshold(16, 4, 1)
    router.select(torch.tensor([[3e38, -3e38, 0.0, -math.inf]] * 10))
    update_biases(router)
    assert router.threshold_E.isfinite().all()
    assert router.threshold_E.gt(0).all()


def test_all_experts_of_every_token_need_no_threshold():
    router = ExpertThreshold(16, 4, 4)
    router.select(-50 * torch.ones(10, 4))
    update_biases(router)
    assert router.select(-60 * torch.ones(10, 4)).tokens_per_expert_E.tolist() == [10] * 4


def test_a_token_without_experts_gets_exactly_nothing():
    router = ExpertThreshold(16, 4, 1).eval()
    router.threshold_E.fill_(1.0)
    moe = MoE(router, Experts(16, 8, 4)).eval()
    x_TD = torch.randn(5, 16, requires_grad=True)
    y_TD, routing = moe(x_TD)
    assert y_TD.eq(0).all()
    assert routing.selection.tokens_per_expert_E.tolist() == [0] * 4
    y_TD.sum().backward()
    assert x_TD.grad.eq(0).all()


def test_the_sequence_loss_takes_k_not_the_columns():
    logits_TE = torch.randn(16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selections = [make(name, 8, 2).select(logits_TE) for name in ("expert_choice", "naive_topk")]
    losses = [sequence_balance_loss(Routing(logits_TE, s, Tokens(seq_len=8)), "sigmoid", 2) for s in selections]
    assert losses[0] == losses[1]


def _update_on_a_rank(rank: int, folder: str, logits_TE: torch.Tensor, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        router = ExpertThreshold(16, 8, 2)
        for part in logits_TE.chunk(2)[rank].split([100, 50]):
            router.select(part)
        update_biases(router)
        results.put(router.threshold_E.tolist())
    finally:
        dist.destroy_process_group()


def test_two_ranks_have_the_thresholds_of_one(tmp_path):
    logits_TE = torch.randn(300, 8) + torch.linspace(-1, 1, 8)
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    arguments = (str(tmp_path), logits_TE, results)
    multiprocessing.start_processes(_update_on_a_rank, arguments, 2, start_method="forkserver")  # raises if one failed
    of_ranks = [results.get() for _ in range(2)]
    router = ExpertThreshold(16, 8, 2)
    router.select(logits_TE)
    update_biases(router)
    assert of_ranks == [router.threshold_E.tolist()] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "sqrtsoftplus"}, "score must be one of softmax, sigmoid, got 'sqrtsoftplus'"),
        ({"max_experts_per_token": 1}, r"max_experts_per_token must be in \[top_k, num_experts\], got max_experts_per"),
        ({"max_experts_per_token": 9}, "max_experts_per_token=9, top_k=2, num_experts=8"),
        ({"threshold_decay": 1.0}, r"threshold_decay must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_one_line(options, said):
    with pytest.raises(ValueError, match=f"^router: [^\n]*{said}[^\n]*$"):
        ExpertThreshold(16, 8, 2, **options)
