import math

import pytest
import torch
from loss_processes import rank_logits, report_losses
from router_reference import every_router, make
from torch import multiprocessing

from moe_lightning.ops import Selection
from moe_lightning.routers import Routing, Tokens, load_balancing_loss, sequence_balance_loss, z_loss


def routing(logits_TE: torch.Tensor, top_k: int = 2) -> Routing:
    return Routing(logits_TE, make("naive_topk", logits_TE.shape[1], top_k).select(logits_TE))


def with_load(logits_TE: torch.Tensor, load: list[int]) -> Routing:
    nothing = torch.empty(0)
    return Routing(logits_TE, Selection(nothing, nothing, torch.tensor(load, dtype=torch.int32), nothing))


def literal_balance(logits_TE: torch.Tensor, load: list[int]) -> float:
    """E * sum_e f_e p_e, in Python floats."""
    rows = [[math.exp(v) for v in row] for row in logits_TE.double().tolist()]
    p = [sum(row[e] / sum(row) for row in rows) / len(rows) for e in range(len(load))]
    return len(load) * sum(count / sum(load) * p[e] for e, count in enumerate(load))


def test_balance_is_one_when_even_and_e_when_collapsed():
    eye_TE = torch.eye(8) * 1e-4  # each token prefers its own expert, by a hair
    assert load_balancing_loss(routing(eye_TE, top_k=1)).item() == pytest.approx(1.0, abs=1e-6)
    collapsed_TE = torch.zeros(8, 8)
    collapsed_TE[:, 3] = 100.0
    assert load_balancing_loss(routing(collapsed_TE, top_k=1)).item() == pytest.approx(8.0, abs=1e-6)


@every_router
def test_balance_follows_the_formula(name):
    logits_TE = torch.randn(33, 6) * 2
    selection = make(name, 6, 2).select(logits_TE)
    expected = literal_balance(logits_TE, selection.tokens_per_expert_E.tolist())
    assert load_balancing_loss(Routing(logits_TE, selection)).item() == pytest.approx(expected, rel=1e-5)


def test_balance_by_hand():
    # p = (0.75, 0.25), f = (0.25, 0.75): 2 * (0.1875 + 0.1875)
    logits_TE = torch.tensor([[math.log(3.0), 0.0]])
    assert load_balancing_loss(with_load(logits_TE, [1, 3])).item() == pytest.approx(0.75, rel=1e-6)


def test_descending_the_balance_gradient_moves_tokens_off_the_crowded_expert():
    logits_TE = torch.zeros(16, 4, requires_grad=True)
    load_balancing_loss(with_load(logits_TE, [13, 1, 1, 1])).backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_balance_gradient_against_finite_differences():
    logits_TE = torch.randn(5, 4, dtype=torch.float64)
    numeric = torch.zeros(5, 4)
    for t in range(5):
        for e in range(4):
            step = torch.zeros(5, 4, dtype=torch.float64)
            step[t, e] = 1e-5
            up, down = (literal_balance(logits_TE + s, [4, 3, 2, 1]) for s in (step, -step))
            numeric[t, e] = (up - down) / 2e-5
    leaf = logits_TE.clone().requires_grad_()
    load_balancing_loss(with_load(leaf, [4, 3, 2, 1])).backward()
    torch.testing.assert_close(leaf.grad.float(), numeric, rtol=1e-3, atol=1e-6)


def test_z_loss_follows_the_formula():
    logits_TE = torch.randn(33, 6) * 3
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_TE.double().tolist()) / 33
    assert z_loss(routing(logits_TE)).item() == pytest.approx(expected, rel=1e-5)
    assert z_loss(routing(torch.zeros(5, 8))).item() == pytest.approx(math.log(8) ** 2, rel=1e-6)


def test_z_loss_gradient_is_twice_the_log_sum_times_the_softmax():
    logits_TE = torch.randn(7, 4, requires_grad=True)
    z_loss(routing(logits_TE)).backward()
    values = logits_TE.detach()
    expected = 2 * values.logsumexp(1, keepdim=True) * values.softmax(1) / 7
    torch.testing.assert_close(logits_TE.grad, expected)


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_half_logits_give_an_fp32_loss(loss):
    logits_TE = (torch.randn(64, 8) * 4).bfloat16()
    assert loss(routing(logits_TE)).dtype == torch.float32
    assert loss(routing(logits_TE)).item() == pytest.approx(loss(routing(logits_TE.float())).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_no_tokens_no_loss(loss):
    logits_TE = torch.empty(0, 4, requires_grad=True)
    value = loss(routing(logits_TE))
    assert value.item() == 0
    value.backward()
    assert logits_TE.grad.shape == (0, 4)


def test_without_a_process_group_both_scopes_agree():
    routed = routing(torch.randn(9, 4))
    assert load_balancing_loss(routed, scope="global").equal(load_balancing_loss(routed, scope="rank"))


@pytest.mark.slow
def test_global_scope_sums_the_counts_of_two_ranks(tmp_path):
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    arguments = str(tmp_path), results
    multiprocessing.start_processes(report_losses, arguments, 2, start_method="forkserver")  # raises if one failed
    ranks = sorted(results.get() for _ in range(2))
    results.close()
    total = [a + b for a, b in zip(ranks[0][4], ranks[1][4], strict=True)]
    for rank, local, everywhere, gradient, counts, untouched in ranks:
        logits_TE = rank_logits(rank)
        assert untouched
        assert sum(counts) == 2 * len(logits_TE)
        assert local == pytest.approx(literal_balance(logits_TE, counts), rel=1e-5)
        assert everywhere == pytest.approx(literal_balance(logits_TE, total), rel=1e-5)
        assert abs(everywhere - local) > 0.1
        leaf = logits_TE.clone().requires_grad_()
        load_balancing_loss(with_load(leaf, total)).backward()
        torch.testing.assert_close(torch.tensor(gradient), leaf.grad)


def sequence_loss_by_hand(scores: list[list[float]], seq_len: int, top_k: int, real: list[bool]) -> float:
    """Equations 17 to 20 of DeepSeek-V3 without their coefficient, a token at a time."""
    total, sequences = 0.0, 0
    for begin in range(0, len(scores), seq_len):
        tokens = [scores[t] for t in range(begin, begin + seq_len) if real[t]]
        if not tokens:
            continue
        sequences += 1
        experts = len(tokens[0])
        for e in range(experts):
            takes = sum(e in sorted(range(experts), key=lambda j: -token[j])[:top_k] for token in tokens)
            f = experts / (top_k * len(tokens)) * takes
            p = sum(token[e] / sum(token) for token in tokens) / len(tokens)
            total += f * p
    return total / max(sequences, 1)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_balance_loss_is_its_formula(score, masked):
    logits_TE = torch.randn(20, 6, requires_grad=True)
    real_T = torch.rand(20) < 0.7 if masked else torch.ones(20, dtype=torch.bool)
    if masked:
        real_T[5:10] = False  # a sequence of nothing
    selection = make("naive_topk", 6, 2).select(logits_TE)
    tokens = Tokens(mask_T=real_T if masked else None, seq_len=5)
    loss = sequence_balance_loss(Routing(logits_TE, selection, tokens), score)
    scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(1)
    assert loss.item() == pytest.approx(sequence_loss_by_hand(scores_TE.tolist(), 5, 2, real_T.tolist()), rel=1e-5)
    loss.backward()
    assert logits_TE.grad[real_T].abs().sum() > 0
    assert logits_TE.grad[~real_T].eq(0).all()


def test_sequence_balance_loss_of_even_sequences_is_one_and_needs_their_length():
    logits_TE = 5 * torch.eye(8).repeat(4, 1)
    selection = make("naive_topk", 8, 1).select(logits_TE)
    assert sequence_balance_loss(Routing(logits_TE, selection, Tokens(seq_len=8))).item() == pytest.approx(1.0)
    for seq_len in (None, 5):
        with pytest.raises(ValueError, match=f"whole sequences, got 32 tokens, seq_len={seq_len}"):
            sequence_balance_loss(Routing(logits_TE, selection, Tokens(seq_len=seq_len)))
    empty = Routing(logits_TE[:0], make("naive_topk", 8, 1).select(logits_TE[:0]), Tokens(seq_len=8))
    assert sequence_balance_loss(empty).item() == 0.0


def test_padding_is_in_no_loss():
    logits_TE = torch.randn(40, 6)
    mask_T = torch.rand(40) < 0.6
    router = make("naive_topk", 6, 2)
    padded = Routing(logits_TE, router.select(logits_TE, Tokens(mask_T=mask_T)), Tokens(mask_T=mask_T))
    alone = Routing(logits_TE[mask_T], router.select(logits_TE[mask_T]))
    for loss in (load_balancing_loss, z_loss):
        torch.testing.assert_close(loss(padded), loss(alone))
    nothing = Tokens(mask_T=torch.zeros(40, dtype=torch.bool))
    for loss in (load_balancing_loss, z_loss):
        assert loss(Routing(logits_TE, router.select(logits_TE, nothing), nothing)).item() == 0.0
