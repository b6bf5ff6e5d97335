"""Shared experts, zero experts and dense layers in a decoder."""

import pytest
import torch
from tiny_models import SIZES, loss, make_moe, some_tokens

from moe_lightning.layers import FeedForward, MoE
from moe_lightning.models import DecoderMoE, DecoderMoEConfig
from moe_lightning.routers import ROUTERS

PARTS = {"n_shared_experts": 2, "shared_expert_gate": True, "n_zero_experts": 3, "n_dense_layers": 1}


def test_which_layer_has_what():
    model = make_moe(**PARTS, n_layers=3)
    assert [type(block.feed_forward) for block in model.blocks] == [FeedForward, MoE, MoE]
    assert model.moe_layers == [model.blocks[1].feed_forward, model.blocks[2].feed_forward]
    assert model.blocks[0].feed_forward.down.weight.shape == (32, 4 * 48)
    layer = model.moe_layers[0]
    assert layer.router.weight.shape == (4 + 3, 32)
    assert layer.experts.up.shape[0] == 4
    assert layer.shared.down.weight.shape == (32, 2 * 48)
    assert layer.shared.gate.weight.shape == (1, 32)
    assert make_moe(n_dense_layers=1, dense_hidden_dim=56).blocks[0].feed_forward.down.weight.shape == (32, 56)


def test_a_model_without_them_has_no_sign_of_them():
    model = make_moe()
    assert not any("shared" in name for name, _ in model.named_parameters())
    assert not set(model.architecture) & set(DecoderMoEConfig.added)
    assert model.architecture.keys() == {
        "model",
        *SIZES,
        "num_experts",
        "top_k",
        "activation",
        "rope_theta",
        "tie_embeddings",
    }


def test_all_that_differs_is_part_of_the_architecture():
    parts = {**PARTS, "dense_hidden_dim": 56}
    model = make_moe(**parts)
    assert parts.items() <= model.architecture.items()
    sizes = {name: value for name, value in model.architecture.items() if name != "model"}
    again = DecoderMoE(DecoderMoEConfig(**sizes, router=ROUTERS["fused_select"]))
    again.load_state_dict(model.state_dict())
    tokens_BS = some_tokens()
    assert torch.equal(again(tokens_BS).logits_BSV, model(tokens_BS).logits_BSV)


def test_projections_into_the_residual_stream_are_drawn_alike():
    model = make_moe(**PARTS, d_model=64, mlp_hidden_dim=256, n_layers=8)
    shared, experts = (
        model.moe_layers[0].shared.down.weight.std(), model.moe_layers[0].experts.down.std(),
    )  # fmt: skip
    assert shared.item() == pytest.approx(experts.item(), rel=0.05)
    assert experts.item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_every_part_learns_with_every_router(router):
    model = make_moe(router, **PARTS).train()
    loss(model, some_tokens(4)).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("recompute", ["moe", "block"])
def test_recomputed_gradients_are_the_same(recompute):
    tokens_BS = some_tokens(4)
    model = make_moe(**PARTS).train()
    loss(model, tokens_BS).backward()
    again = make_moe(**PARTS, recompute=recompute).train()
    again.load_state_dict(model.state_dict())
    loss(again, tokens_BS).backward()
    for (name, expected), (_, actual) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad), name


def test_all_that_does_not_route_is_compiled():
    model = make_moe(**PARTS)
    model.compile_blocks()
    for block in model.blocks:
        layer = block.feed_forward
        assert block.compiled
        assert (layer.shared if isinstance(layer, MoE) else layer)._compiled_call_impl is not None
        assert layer._compiled_call_impl is None or not isinstance(layer, MoE)
