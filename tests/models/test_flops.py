import pytest
import torch
from tiny_models import SIZES, VOCAB, make_dense, make_moe, some_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_lightning.models import MLPDecoder
from moe_lightning.routers import ROUTERS

D, F, V, L = SIZES["d_model"], SIZES["mlp_hidden_dim"], VOCAB, SIZES["n_layers"]
S = 12


def counted(model: torch.nn.Module) -> float:
    """Forward FLOPs of one token by torch's own count of matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(some_tokens(1, S))
    return counter.get_total_flops() / S


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_against_the_flop_counter(activation, tied):
    model = make_dense(activation=activation, tie_embeddings=tied)
    norms = 2 * D * (2 * L + 1)  # products of no matrix: the counter leaves them out
    future = 4 * D * (S / 2) * L  # torch counts attention to the future as well
    assert model.flops_per_token(S) == pytest.approx(counted(model) + norms - future, rel=1e-9)


def test_mlp_against_the_flop_counter():
    model = MLPDecoder(V, D)
    biases = 2 * 2 * D
    assert model.flops_per_token(S) == pytest.approx(counted(model) + biases, rel=1e-9)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (8, 1), (3, 3)])
def test_moe_by_hand(num_experts, top_k):
    model = make_moe(num_experts=num_experts, top_k=top_k)
    met = 4 * D * D + 2 * D + num_experts * D + top_k * 3 * F * D
    expected = 2 * (L * met + D + V * D) + L * 4 * D * S / 2
    assert model.flops_per_token(S) == expected


def test_shared_experts_zero_experts_and_dense_layers_by_hand():
    model = make_moe(n_shared_experts=2, shared_expert_gate=True, n_zero_experts=4, n_dense_layers=1)
    attention, gate = 4 * D * D + 2 * D, (4 + 4) * D
    moe = attention + gate + 2 * 3 * F * D // 2 + 2 * 3 * F * D + D  # every other choice is a zero expert
    dense = attention + 3 * (2 + 2) * F * D
    assert model.flops_per_token(S) == 2 * (moe + dense + D + V * D) + L * 4 * D * S / 2


def test_useful_flops_are_the_same_for_every_router():
    assert len({make_moe(name).flops_per_token(S) for name in ROUTERS}) == 1


def test_one_expert_costs_what_the_dense_model_costs_and_its_gate():
    assert make_moe(num_experts=1, top_k=1).flops_per_token(S) == make_dense().flops_per_token(S) + 2 * L * D
