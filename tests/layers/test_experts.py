import pytest
import torch
from torch.nn import functional as F

from moe_lightning.layers import Experts
from moe_lightning.layers.experts import grouped_linear, loop_linear
from moe_lightning.ops import RowWeights


def test_loop_linear_on_small_integers():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0, 0.0]], [[7.0, 7.0]], [[0.0, 10.0]]])  # E=3, O=1, I=2
    offsets = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    assert loop_linear(rows, weight, offsets).tolist() == [[1], [40], [60]]


@pytest.mark.parametrize(
    "counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 4, 5, 0]], ids=["some", "all but last", "first", "middle"]
)
def test_grouped_and_loop_are_equal_on_integers_and_so_are_their_gradients(counts):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    results = []
    rows, weight = torch.randint(-4, 5, (9, 16)).float(), torch.randint(-4, 5, (4, 8, 16)).float()
    grad = torch.randint(-4, 5, (9, 8)).float()
    for linear in (loop_linear, grouped_linear):
        leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear(*leaves, offsets)
        out.backward(grad)
        results.append((out.detach(), leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    empty = [e for e, count in enumerate(counts) if not count]
    assert results[0][2][empty].eq(0).all()


def test_all_rows_to_all_experts_is_each_expert_by_itself():
    experts, x_TD = Experts(16, 24, 3), torch.randn(5, 16)
    together_ETD = experts(x_TD.expand(3, 5, 16), None)
    for e in range(3):
        gate, up = F.linear(x_TD, experts.up[e]).chunk(2, 1)
        torch.testing.assert_close(together_ETD[e], F.linear(F.silu(gate) * up, experts.down[e]))


@pytest.mark.parametrize(("d_model", "hidden", "chosen"), [(16, 24, "grouped_mm"), (12, 24, "loop"), (16, 20, "loop")])
def test_auto_takes_the_first_that_supports_the_case(d_model, hidden, chosen):
    experts = Experts(d_model, hidden, 2, implementation="auto")
    assert experts.implementation_for(torch.float32, torch.device("cpu")) == chosen
    assert experts.implementation_for(torch.float64, torch.device("cpu")) == "loop"
    assert not experts.fuses_weights(torch.randn(3, d_model))
    assert "implementation=auto" in repr(experts)
    rows = torch.randn(6, d_model)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    loop = Experts(d_model, hidden, 2, implementation="loop")
    loop.load_state_dict(experts.state_dict())
    torch.testing.assert_close(experts(rows, offsets), loop(rows, offsets))


@pytest.mark.parametrize("implementation", ["loop", "grouped_mm"])
def test_folded_weights_scale_the_rows(implementation):
    experts = Experts(16, 24, 3, implementation=implementation)
    rows, offsets = torch.randn(8, 16), torch.tensor([0, 2, 2, 8], dtype=torch.int32)
    weights_TK, perm_N = torch.rand(4, 2), torch.randperm(8).int()
    scaled = experts(rows, offsets) * weights_TK.flatten()[perm_N][:, None]
    torch.testing.assert_close(experts(rows, offsets, RowWeights(weights_TK, perm_N)), scaled)


def test_weights_start_as_a_narrow_normal():
    experts = Experts(64, 64, 8)
    for weight in (experts.up, experts.down):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(weight.mean().item()) < 1e-3


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^experts: implementation must be one of auto, .* got 'xyz'$"):
        Experts(16, 24, 2, implementation="xyz")
    with pytest.raises(ValueError, match=r"grouped_mm needs .* multiples of 8, got d_model=12, hidden_dim=24; use"):
        Experts(12, 24, 2, implementation="grouped_mm")
    with pytest.raises(ValueError, match=r"cutlass needs .* multiples of 8, got d_model=16, hidden_dim=20; use"):
        Experts(16, 20, 2, implementation="cutlass")
    with pytest.raises(ValueError, match=r"^experts: cutlass is not possible: .* got device=cpu; or use experts=auto"):
        Experts(16, 24, 2, implementation="cutlass")(torch.randn(3, 16), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"^activation: must be 'swiglu' or 'gelu', got 'relu'"):
        Experts(16, 24, 2, activation="relu")
