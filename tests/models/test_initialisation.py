import math

import pytest
import torch
from tiny_models import MAKERS, SIZES, VOCAB, loss, make_dense, make_moe, some_tokens

from moe_lightning.models import DecoderConfig, DecoderMoE, DecoderMoEConfig, MLPDecoder, TransformerDecoder

DEEP = {"vocab_size": 64, "d_model": 64, "n_heads": 4, "n_layers": 8, "mlp_hidden_dim": 64}
D, F, V, L, E = SIZES["d_model"], SIZES["mlp_hidden_dim"], VOCAB, SIZES["n_layers"], 4


@pytest.mark.parametrize("model", list(MAKERS))
def test_the_first_loss_is_that_of_a_guess(model):
    with torch.no_grad():
        assert loss(MAKERS[model](), some_tokens(16, 33)).item() == pytest.approx(math.log(V), abs=0.05)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: make_dense(), 2 * V * D + D + L * (4 * D * D + 2 * D + 3 * F * D)),
        (lambda: make_dense(activation="gelu"), 2 * V * D + D + L * (4 * D * D + 2 * D + 2 * F * D)),
        (lambda: make_dense(tie_embeddings=True), V * D + D + L * (4 * D * D + 2 * D + 3 * F * D)),
        (lambda: make_moe(), 2 * V * D + D + L * (4 * D * D + 2 * D + E * D + E * 3 * F * D)),
        (lambda: MLPDecoder(V, D), 2 * V * D + 2 * (D * D + D)),
    ],
    ids=["dense", "dense gelu", "dense tied", "moe", "mlp"],
)
def test_parameter_count(model, expected):
    assert sum(p.numel() for p in model().parameters()) == expected


def test_tied_embeddings_are_one_tensor_in_training_too():
    model = make_moe(tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loss(model, some_tokens()).backward()
    before = model.embedding.weight.detach().clone()
    optimizer.step()
    assert model.head.weight.equal(model.embedding.weight)
    assert not model.embedding.weight.equal(before)
    untied = make_moe()
    assert not untied.head.weight.equal(untied.embedding.weight)


def test_projections_into_the_residual_stream_start_narrower():
    model = DecoderMoE(DecoderMoEConfig(**DEEP, num_experts=4))
    narrow = 0.02 / math.sqrt(16)
    for block in model.blocks:
        assert block.attention.out.weight.std().item() == pytest.approx(narrow, rel=0.1)
        assert block.feed_forward.experts.down.std().item() == pytest.approx(narrow, rel=0.1)
        assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.feed_forward.experts.up.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.feed_forward.router.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert block.attention_norm.weight.eq(1).all()
    dense = TransformerDecoder(DecoderConfig(**DEEP))
    assert dense.blocks[0].feed_forward.down.weight.std().item() == pytest.approx(narrow, rel=0.1)


@pytest.mark.parametrize("model", list(MAKERS))
def test_the_same_seed_gives_the_same_model_and_every_weight_learns(model):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(MAKERS[model]().state_dict())
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    learner = MAKERS[model]()
    loss(learner, some_tokens(8, 33)).backward()
    assert [name for name, p in learner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_routings_come_one_a_layer_in_order():
    model, tokens_BS = make_moe(n_layers=3), some_tokens()
    output = model(tokens_BS)
    assert len(output.routings) == len(model.moe_layers) == 3
    seen = []
    for layer in model.moe_layers:
        layer.router.register_forward_hook(lambda *_: None)
        layer.hook = lambda phase, tensor=None, step=None: seen.append(tensor) if phase.name == "SELECT" else None
    again = model(tokens_BS)
    assert all(r.logits_TE is logits for r, logits in zip(again.routings, seen, strict=True))
    assert make_dense()(tokens_BS).routings == ()
