"""The options of `topk`: what today's models make of logits, written down once more."""

import pytest
import torch
from router_reference import VARYING_ROUTERS, make

from moe_lightning.routers import NO_TOKENS, ROUTERS, Tokens


def test_mixtral_olmoe_llama4_and_deepseek():
    logits_TE = torch.randn(30, 16)
    chosen_TK, ids_TK = logits_TE.topk(2)
    mixtral = make("topk", 16, 2).select(logits_TE)
    olmoe = make("topk", 16, 2, renormalize=False).select(logits_TE)
    llama4 = make("topk", 16, 1, score="sigmoid", renormalize=False).select(logits_TE)
    deepseek = make("topk", 16, 2, score="sigmoid", scaling_factor=2.5).select(logits_TE)
    assert mixtral.expert_ids_TK.equal(ids_TK.int())
    torch.testing.assert_close(mixtral.weights_TK, chosen_TK.softmax(1))
    torch.testing.assert_close(olmoe.weights_TK, logits_TE.softmax(1).topk(2).values)
    torch.testing.assert_close(llama4.weights_TK, chosen_TK[:, :1].sigmoid())
    sigmoids_TK = chosen_TK.sigmoid()
    torch.testing.assert_close(deepseek.weights_TK, 2.5 * sigmoids_TK / sigmoids_TK.sum(1, keepdim=True))


def test_a_softmax_after_the_choice_is_over_the_chosen():
    logits_TE = torch.randn(30, 16)
    router = make("topk", 16, 4, score_after_choice=True, renormalize=False)
    torch.testing.assert_close(router.select(logits_TE).weights_TK, logits_TE.topk(4).values.softmax(1))


@pytest.mark.parametrize("name", ["topk", "sinkhorn", "aux_free"])
def test_a_gate_bias_is_learnt_and_begins_at_zero(name):
    router = make(name, 8, 2, training=True, gate_bias=True)
    assert router.bias.eq(0).all()
    with torch.no_grad():
        router.bias.copy_(torch.arange(8.0))
    x_TD = torch.randn(20, 16)
    torch.testing.assert_close(router.gate(x_TD), x_TD @ router.weight.T + torch.arange(8.0))
    router(x_TD).logits_TE.sum().backward()
    assert router.bias.grad.tolist() == [20.0] * 8


def test_one_expert_of_weight_one_is_warned_of():
    with pytest.warns(UserWarning, match="a renormalised weight is always 1.*renormalize: false"):
        make("topk", 8, 1)


@pytest.mark.parametrize("name", list(ROUTERS))
@pytest.mark.parametrize("skip_masked", [False, True])
def test_padding_is_in_no_load_and_no_capacity(name, skip_masked):
    torch.manual_seed(0)
    router = make(name, 8, 2, training=True, capacity_factor=1.0, skip_masked=skip_masked)
    logits_TE = torch.randn(64, 8) + torch.linspace(-1, 1, 8)
    mask_T = torch.rand(64) < 0.6
    ids_T = torch.randint(100, (64,))
    selection = router.select(logits_TE, Tokens(ids_T, mask_T))
    if name != "sinkhorn":  # which balances over the whole batch
        alone = router.select(logits_TE[mask_T], Tokens(ids_T[mask_T]))
        assert selection.expert_ids_TK[mask_T].equal(alone.expert_ids_TK)
        torch.testing.assert_close(selection.weights_TK[mask_T], alone.weights_TK)
        assert selection.tokens_per_expert_E.equal(alone.tokens_per_expert_E)
    kept = selection.expert_ids_TK[mask_T]
    counts = torch.bincount(kept[kept >= 0].long(), minlength=8)
    assert selection.tokens_per_expert_E.tolist() == counts.tolist()
    if skip_masked or name in VARYING_ROUTERS:  # which take no padding
        assert selection.expert_ids_TK[~mask_T].eq(-1).all()
        assert selection.weights_TK[~mask_T].eq(0).all()
    else:
        assert selection.expert_ids_TK[~mask_T].ge(0).all()
    assert router.drops_tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "relu"}, "score must be one of softmax, sigmoid, sqrtsoftplus, got 'relu'"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive and finite, got scaling_factor=0.0"),
        ({"n_group": 3}, "n_group must divide num_experts, got n_group=3, num_experts=8; 1 means no groups"),
        ({"n_group": 4, "topk_group": 0}, r"topk_group must be in \[1, n_group\], got topk_group=0, n_group=4"),
        ({"n_group": 8, "topk_group": 1}, "topk_group groups must hold top_k experts, got topk_group=1, 1 experts"),
        ({"n_group": 4, "topk_group": 2, "score_after_choice": True}, "groups are ranked by scores"),
    ],
)
def test_bad_options_are_one_line(options, said):
    with pytest.raises(ValueError, match=f"^router: {said}[^\n]*$"):
        make("topk", 8, 2, **options)


def test_a_hash_sends_a_word_to_the_same_experts_wherever_it_is():
    router = make("hash", 16, 2)
    ids_T = torch.randint(1000, (4000,))
    selection = router.select(torch.randn(4000, 16), Tokens(ids_T))
    of_word = {}
    for word, experts in zip(ids_T.tolist(), selection.expert_ids_TK.tolist(), strict=True):
        assert of_word.setdefault(word, experts) == experts
    assert selection.weights_TK.eq(0.5).all()
    every = router.select(torch.randn(1000, 16), Tokens(torch.arange(1000))).tokens_per_expert_E
    assert every.sum() == 2000
    assert every.max() < 1.4 * every.float().mean()
    other = make("hash", 16, 2, hash_seed=1).select(torch.randn(1000, 16), Tokens(torch.arange(1000)))
    same = other.expert_ids_TK.eq(router.select(torch.randn(1000, 16), Tokens(torch.arange(1000))).expert_ids_TK)
    assert same.float().mean() < 0.15
    assert router.select(torch.randn(9, 16), NO_TOKENS).expert_ids_TK.shape == (9, 2)


@pytest.mark.parametrize("name", ["hash", "frozen_random"])
def test_what_is_fixed_does_not_learn(name):
    assert not any(p.requires_grad for p in make(name, 8, 2, gate_bias=True).parameters())
