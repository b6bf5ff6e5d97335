"""Permute and unpermute: literal rows, gradients by name, and dropped slots that hold garbage."""

import pytest
import torch

from moe_lightning.ops import build_index, permute, unpermute

LITERAL_IDS_TK = torch.tensor([[2, 0], [0, 3], [2, 0]], dtype=torch.int32)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_literal_permute():
    x_TD = torch.tensor([[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]])
    rows_ND = permute(x_TD, build_index(LITERAL_IDS_TK, 4), 2)
    assert rows_ND[:, 0].tolist() == [10, 20, 30, 10, 30, 20]


def test_literal_unpermute():
    rows_ND = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    weights_TK = torch.tensor([[1.0, 10.0], [1.0, 10.0], [1.0, 10.0]])
    y_TD = unpermute(rows_ND, weights_TK, build_index(LITERAL_IDS_TK, 4))
    assert y_TD.flatten().tolist() == [4 + 10, 2 + 60, 5 + 30]  # slots stand in rows 3, 0 | 1, 5 | 4, 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_round_trip_is_bitwise_on_small_integers(dtype, top_k):
    x_TD = torch.randint(-8, 9, (50, 5)).to(dtype)
    index = build_index(torch.randint(7, (50, top_k)).int(), 7)
    weights_TK = torch.full((50, top_k), 1.0 / top_k)
    assert torch.equal(unpermute(permute(x_TD, index, top_k), weights_TK, index), x_TD)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("may_drop", [False, True])
def test_output_and_gradients(dtype, may_drop):
    tokens, width, top_k, experts = 40, 6, 3, 5
    ids_TK = torch.randint(-1 if may_drop else 0, experts, (tokens, top_k)).int()
    index = build_index(ids_TK, experts)
    inputs = {
        "x": torch.randn(tokens, width).to(dtype),
        "scale": torch.randn(experts + 1, width).to(dtype),
        "weights": torch.rand(tokens, top_k, dtype=torch.float64 if dtype == torch.float64 else None),
    }
    upstream_TD = torch.randn(tokens, width).to(dtype)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    expert_N = ids_TK.long().flatten()[index.perm_N].remainder(experts + 1)
    rows_ND = permute(leaves["x"], index, top_k, may_drop) * leaves["scale"][expert_N]
    y_TD = unpermute(rows_ND, leaves["weights"], index, may_drop)
    y_TD.backward(upstream_TD)

    # The same in fp64, a token at a time, with no index at all.
    doubles = {name: t.double().requires_grad_() for name, t in inputs.items()}
    kept_TK = (ids_TK >= 0).double()
    scaled_TKD = doubles["x"][:, None] * doubles["scale"][ids_TK.long().remainder(experts + 1)]
    expected_TD = (scaled_TKD * (doubles["weights"] * kept_TK)[:, :, None]).sum(1)
    expected_TD.backward(upstream_TD.double())

    assert y_TD.dtype == dtype
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            leaf.grad.double(),
            doubles[name].grad,
            rtol=TOLERANCE[dtype],
            atol=8 * TOLERANCE[dtype],
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


def test_gradcheck_in_fp64():
    index = build_index(torch.tensor([[0, -1], [2, 0], [1, 2]], dtype=torch.int32), 3)
    x_TD = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows_ND = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    kept_N1 = (torch.arange(6) < index.expert_offsets[-1]).double()[:, None]
    for may_drop in (True, False):
        # What follows a drop is masked by unpermute; here the test itself stands for it.
        mask = kept_N1 if may_drop else 1.0
        assert torch.autograd.gradcheck(lambda x, drop=may_drop, m=mask: permute(x, index, 2, drop) * m, (x_TD,))
        assert torch.autograd.gradcheck(lambda r, w, drop=may_drop: unpermute(r, w, index, drop), (rows_ND, weights_TK))


def test_dropped_slots_give_exactly_zero_even_from_garbage():
    ids_TK = torch.tensor([[0, -1], [-1, -1], [1, 0]], dtype=torch.int32)
    index = build_index(ids_TK, 2)
    kept = index.expert_offsets[-1].item()
    x_TD = torch.ones(3, 4, requires_grad=True)
    weights_TK = torch.full((3, 2), 0.5)
    weights_TK[1] = torch.nan
    weights_TK.requires_grad_()
    rows_ND = permute(x_TD, index, 2, may_drop=True)
    rows_ND = torch.cat([rows_ND[:kept], torch.full_like(rows_ND[kept:], torch.nan)]).detach().requires_grad_()
    y_TD = unpermute(rows_ND, weights_TK, index, may_drop=True)
    assert y_TD[:, 0].tolist() == [0.5, 0.0, 1.0]
    y_TD.sum().backward()
    assert torch.equal(rows_ND.grad[kept:], torch.zeros(3, 4))
    assert weights_TK.grad.tolist() == [[4.0, 0.0], [0.0, 0.0], [4.0, 4.0]]

    garbage_ND = torch.ones(6, 4)
    garbage_ND[kept:] = torch.nan
    permute(x_TD, index, 2, may_drop=True).backward(garbage_ND)
    assert x_TD.grad[:, 0].tolist() == [1.0, 0.0, 2.0]


def test_sums_of_halves_are_taken_in_fp32():
    index = build_index(torch.zeros(1, 32, dtype=torch.int32), 1)
    rows_ND = torch.tensor([2048.0] + [1.0] * 31, dtype=torch.float16)[:, None]  # in fp16, 2048 + 1 == 2048
    assert unpermute(rows_ND, torch.ones(1, 32), index).item() == 2080  # 2079 rounded once, at the end


def test_no_tokens():
    index = build_index(torch.empty(0, 2, dtype=torch.int32), 3)
    x_TD = torch.empty(0, 4, requires_grad=True)
    weights_TK = torch.empty(0, 2, requires_grad=True)
    unpermute(permute(x_TD, index, 2, True), weights_TK, index, True).sum().backward()
    assert x_TD.grad.shape == (0, 4)
    assert weights_TK.grad.shape == (0, 2)


def test_compiles_whole():
    def step(x_TD, weights_TK, ids_TK):
        index = build_index(ids_TK, 5)
        return unpermute((2 * permute(x_TD, index, 2)), weights_TK, index, may_drop=True)

    x_TD, weights_TK = torch.randn(9, 4, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    ids_TK = torch.randint(-1, 5, (9, 2)).int()
    compiled_TD = torch.compile(step, fullgraph=True, backend="aot_eager")(x_TD, weights_TK, ids_TK)
    eager_TD = step(x_TD, weights_TK, ids_TK)
    assert torch.equal(compiled_TD, eager_TD)
    compiled_grads = torch.autograd.grad(compiled_TD.sum(), (x_TD, weights_TK))
    eager_grads = torch.autograd.grad(eager_TD.sum(), (x_TD, weights_TK))
    assert all(torch.equal(a, b) for a, b in zip(compiled_grads, eager_grads, strict=True))
