"""Choices that are recorded and taken again: the ids of then, the weights and gradients of now."""

from pathlib import Path

import pytest
import torch

from moe_lightning.layers import Experts, MoE
from moe_lightning.models import DecoderMoE, DecoderMoEConfig
from moe_lightning.ops.select import expert_scores
from moe_lightning.routers import ROUTERS, Tokens, TopK
from moe_lightning.routers.replay import Choices, record, replay

REPLAYABLE = [name for name in ROUTERS if name not in ("expert_choice", "expert_threshold")]
D, E, K, T = 16, 8, 2, 33


def model(router="topk", **kwargs) -> DecoderMoE:
    sizes = {"vocab_size": 53, "d_model": D, "n_heads": 2, "n_layers": 3, "mlp_hidden_dim": 24, "num_experts": E}
    return DecoderMoE(DecoderMoEConfig(**sizes, top_k=K, router=ROUTERS[router], **kwargs))


@pytest.mark.parametrize("name", REPLAYABLE)
def test_replayed_by_the_same_weights_nothing_changes(name):
    network = model(name)  # in training, where sinkhorn balances
    tokens_BS = torch.randint(0, 53, (2, 9))
    with record(network) as choices:
        expected = [network(tokens_BS), network(tokens_BS.flip(1))]
    assert [len(layers) for layers in choices.passes] == [3, 3]
    with replay(network, choices):
        again = [network(tokens_BS), network(tokens_BS.flip(1))]
    for then, now in zip(expected, again, strict=True):
        torch.testing.assert_close(now.logits_BSV, then.logits_BSV, rtol=1e-5, atol=1e-6)
        for a, b in zip(then.routings, now.routings, strict=True):
            assert torch.equal(a.selection.expert_ids_TK, b.selection.expert_ids_TK)
            assert torch.equal(a.selection.tokens_per_expert_E, b.selection.tokens_per_expert_E)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_and_gradients_are_of_the_logits_of_now(score, renormalize):
    router = TopK(D, E, K, score=score, renormalize=renormalize, scaling_factor=2.5, n_group=4, topk_group=2)
    given = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    x_TD, grad_TK = torch.randn(T, D), torch.randn(T, K)
    with torch.no_grad():
        router.weight.mul_(30.0)
    with replay(router, Choices([[given]])):
        selection = router(x_TD).selection
    assert torch.equal(selection.expert_ids_TK, given)
    assert selection.invalid_rows == 0
    assert selection.tokens_per_expert_E.tolist() == torch.bincount(given.flatten(), minlength=E).tolist()
    (gradient,) = torch.autograd.grad(selection.weights_TK, router.weight, grad_TK)

    weight_ED = router.weight.detach().double().requires_grad_()
    logits_TE = x_TD.double() @ weight_ED.T
    if score == "softmax" and renormalize:
        weights_TK = logits_TE.gather(1, given.long()).softmax(1)
    else:
        weights_TK = expert_scores(logits_TE, score).gather(1, given.long())
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True) if renormalize else weights_TK
    torch.testing.assert_close(selection.weights_TK.double(), 2.5 * weights_TK, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(2.5 * weights_TK, weight_ED, grad_TK.double())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_other_weights_make_the_same_choices():
    sampler, learner = model(), model()
    tokens_BS = torch.randint(0, 53, (2, 9))
    with record(sampler) as choices, torch.no_grad():
        sampler(tokens_BS)
    free = learner(tokens_BS)
    with replay(learner, choices):
        output = learner(tokens_BS)
    output.logits_BSV.sum().backward()
    for layer, (routing, ids_TK) in enumerate(zip(output.routings, choices.passes[0], strict=True)):
        assert torch.equal(routing.selection.expert_ids_TK, ids_TK)
        assert not torch.equal(free.routings[layer].selection.expert_ids_TK, ids_TK)
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in learner.moe_layers)
    assert torch.equal(learner(tokens_BS).logits_BSV, free.logits_BSV)  # it ends with the context


@pytest.mark.parametrize("recompute", ["moe", "block"])
def test_a_pass_that_backward_repeats_is_none(recompute):
    network = model(recompute=recompute).train()
    tokens_BS = torch.randint(0, 53, (2, 9))
    with record(network) as choices:
        for _ in range(2):
            network(tokens_BS).logits_BSV.sum().backward()
    assert len(choices.passes) == 2
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with replay(network, choices):
        for _ in range(2):
            network(tokens_BS).logits_BSV.sum().backward()
    for now, then in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(now.grad, then, rtol=1e-4, atol=1e-6)


def test_capacity_and_padding_drop_what_they_drop():
    router = ROUTERS["topk"](D, E, K, capacity_factor=0.7, skip_masked=True).train()
    x_TD, tokens = torch.randn(T, D), Tokens(mask_T=torch.rand(T) < 0.7)
    with record(router) as choices:
        then = router(x_TD, tokens).selection
    assert choices.passes[0][0].min() >= 0
    with replay(router, choices):
        now = router(x_TD, tokens).selection
    assert (now.expert_ids_TK < 0).any()
    for a, b in zip(then, now, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bias_that_only_chooses_is_not_updated_by_a_replay():
    router = ROUTERS["aux_free"](D, E, K).train()
    with record(router) as choices:
        router(torch.randn(T, D))
    gathered = router.gathered.clone()
    with replay(router, choices):
        router(torch.randn(T, D))
    assert torch.equal(router.gathered, gathered)
    assert gathered.sum() == T * K


def test_an_invalid_row_is_counted():
    moe = MoE(ROUTERS["topk"](D, E, K), Experts(D, 24, E))
    x_TD = torch.randn(T, D)
    with record(moe) as choices:
        moe(x_TD)
    x_TD[4] = float("nan")
    with replay(moe, choices):
        y_TD, routing = moe(x_TD)
    assert routing.selection.invalid_rows == 1
    assert y_TD[4].isnan().all()


def test_a_file_of_plain_tensors(tmp_path: Path):
    network, tokens_BS = model(), torch.randint(0, 53, (2, 9))
    with record(network) as choices:
        expected = network(tokens_BS).logits_BSV
        network(tokens_BS[:1])
    torch.save(choices.tensors(), tmp_path / "choices.pt")
    loaded = Choices.of(torch.load(tmp_path / "choices.pt", weights_only=True)).to("cpu")
    assert [[ids.shape for ids in layers] for layers in loaded.passes] == [[(18, K)] * 3, [(9, K)] * 3]
    with replay(network, loaded):
        assert torch.equal(network(tokens_BS).logits_BSV, expected)


IDS = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"first": IDS}, r'names must be "pass.router", two numbers, got \'first\''),
        ({"0.1": IDS}, r"numbered from 0, got \[1\] in 0"),
        ({"0.0": IDS, "1.0": IDS, "1.1": IDS}, r"got 2 in pass 1, 1 in pass 0"),
        ({"0.0": IDS.float()}, r"integers of shape \(tokens, top_k\), got torch.float32 \(2, 2\) in pass 0, router 0"),
        ({"0.0": IDS[0]}, r"integers of shape \(tokens, top_k\), got torch.int64 \(2,\)"),
        ({"0.0": IDS - 1}, r"must not be negative, got -1 in pass 0, router 0"),
        ({"0.0": IDS * 0}, r"experts must differ, got one twice in pass 0, router 0"),
    ],
)
def test_a_file_that_holds_something_else(tensors, message):
    with pytest.raises(ValueError, match=f"^replay: .*{message}"):
        Choices.of(tensors)


def test_choices_that_do_not_fit():
    router = ROUTERS["topk"](D, E, K)
    with (
        pytest.raises(ValueError, match=r"^replay: ids must be below num_experts=8, got 9 in pass 0"),
        replay(router, Choices([[IDS * 3]])),
    ):
        pass
    with pytest.raises(ValueError, match=r"^replay: .* got 2 for 1"), replay(router, Choices([[IDS, IDS]])):
        pass
    with replay(router, Choices([[IDS]])):
        with pytest.raises(ValueError, match=r"^replay: .* got ids of shape \(2, 2\) for 3 tokens"):
            router(torch.randn(3, D))
        with pytest.raises(ValueError, match=r"^replay: .* got a pass more than the 1"):
            router(torch.randn(2, D))
        with pytest.raises(ValueError, match=r"^replay: .* once at a time"), record(router):
            pass
    with (
        pytest.raises(ValueError, match=r"^replay: there must be routers, got a Linear without"),
        record(torch.nn.Linear(2, 2)),
    ):
        pass
    free = ROUTERS["expert_threshold"](D, E, K)
    ids = torch.stack([torch.randperm(E)[:4] for _ in range(3)])
    with pytest.raises(ValueError, match=r"^replay: ExpertThreshold makes its weights"), replay(free, Choices([[ids]])):
        free(torch.randn(3, D))
    assert router.choice_hook is None


def test_routers_must_be_asked_in_their_order():
    routers = torch.nn.ModuleList(ROUTERS["topk"](D, E, K) for _ in range(2))
    with record(routers), pytest.raises(ValueError, match=r"^replay: routers must be asked in the order .* router 1 "):
        routers[1](torch.randn(3, D))
