"""The experts' feed-forward op: its reference on the CPU, its checks, its FLOPs."""

import pytest
import torch
from ffn_cases import make_case, plain, run
from ops_checks import DEVICES
from torch.utils.flop_counter import FlopCounterMode

from moe_lightning.ops import Gathered, RoutingIndex, RowWeights, expert_ffn, permute
from moe_lightning.ops.expert_ffn import Added, missing

COUNTS = ([3, 0, 5, 2], [0, 0, 0, 10], [10, 0, 0, 0], [1, 1, 7, 1])
activations = pytest.mark.parametrize("activation", ["swiglu", "gelu"])
weightings = pytest.mark.parametrize("weighted", [False, True])


@activations
@weightings
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dropped", [0, 4])
def test_against_autograd_in_fp64(counts, dropped, weighted, activation):
    case = make_case(counts, 16, 24, activation, torch.float64, dropped=dropped)
    upstream_ND = torch.randn_like(case.rows_ND)
    actual, expected = (f(case, activation, weighted, upstream_ND) for f in (run, plain))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@weightings
def test_a_buffer_takes_the_outputs_and_then_the_gradient_of_the_rows(weighted):
    case = make_case([3, 0, 5, 2], 16, 24, "swiglu", torch.float32, dropped=2)
    upstream_ND, buffer_ND = torch.randn_like(case.rows_ND), torch.full_like(case.rows_ND, torch.nan)
    for actual, expected in zip(
        run(case, "swiglu", weighted, upstream_ND, buffer_ND), run(case, "swiglu", weighted, upstream_ND), strict=True
    ):
        assert actual.equal(expected)
    with pytest.raises(ValueError, match=r"^ops.expert_ffn: out must be like the rows, got \(11, 16\)"):
        run(case, "swiglu", weighted, upstream_ND, buffer_ND[:-1])


@activations
def test_gradcheck(activation):
    case = make_case([2, 0, 3, 1], 8, 8, activation, torch.float64)
    leaves = [t.requires_grad_() for t in case[:4]]

    def call(rows_ND, up_EGD, down_EDF, weights_TK):
        return expert_ffn(rows_ND, up_EGD, down_EDF, case.offsets, activation, RowWeights(weights_TK, case.perm_N))

    torch.autograd.gradcheck(call, leaves)


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_as_near_as_torch(dtype, activation):
    case = make_case([30, 0, 50, 20], 64, 48, activation, dtype)
    upstream_ND = torch.randn_like(case.rows_ND)
    exact = plain(case, activation, True, upstream_ND)
    theirs = plain(case, activation, True, upstream_ND, dtype)
    for actual, own, right in zip(run(case, activation, True, upstream_ND), theirs, exact, strict=True):
        assert (actual.double() - right).norm() <= 2 * (own.double() - right).norm() + 1e-5 * right.norm()


@activations
def test_rows_of_dropped_slots_are_not_read(activation):
    case = make_case([3, 0, 5, 2], 16, 24, activation, torch.float32, dropped=4)
    upstream_ND = torch.randn_like(case.rows_ND)
    clean = run(case, activation, True, upstream_ND)
    live = int(case.offsets[-1])
    for tensor in (case.rows_ND, upstream_ND):
        tensor[live:] = torch.nan
    for actual, expected in zip(run(case, activation, True, upstream_ND), clean, strict=True):
        assert torch.equal(actual, expected)


def test_an_expert_without_rows_has_gradients_of_exactly_zero():
    case = make_case([3, 0, 5, 0], 16, 24, "swiglu", torch.float32, dropped=2)
    _, _, grad_up, grad_down, grad_weights_TK = run(case, "swiglu", True, torch.randn_like(case.rows_ND))
    for grad in (grad_up, grad_down):
        assert grad[[1, 3]].eq(0).all()
        assert grad[[0, 2]].abs().amax((1, 2)).gt(0).all()
    assert (grad_weights_TK.flatten()[case.perm_N.long()][8:] == 0).all()


def test_no_rows():
    case = make_case([0, 0], 16, 24, "swiglu", torch.float32)
    out, grad_rows, *weights = run(case, "swiglu", True, torch.randn_like(case.rows_ND))
    assert out.shape == grad_rows.shape == (0, 16)
    assert all(grad.eq(0).all() for grad in weights)


def test_frozen_experts_get_no_gradient():
    case = make_case([3, 5], 16, 24, "swiglu", torch.float32)
    rows_ND = case.rows_ND.requires_grad_()
    out_ND = expert_ffn(rows_ND, case.up_EGD, case.down_EDF, case.offsets)
    out_ND.sum().backward()
    assert rows_ND.grad.abs().sum() > 0
    assert case.up_EGD.grad is case.down_EDF.grad is None


def test_flops_are_counted():
    case = make_case([3, 0, 5], 16, 24, "swiglu", torch.float32)
    leaves = [t.requires_grad_() for t in case[:3]]
    with FlopCounterMode(display=False) as counter:
        out_ND = expert_ffn(*leaves, case.offsets)
    forward = counter.get_total_flops()
    assert forward == 2 * 8 * (48 * 16 + 16 * 24)
    with FlopCounterMode(display=False) as counter:
        out_ND.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_what_the_kernels_cannot_take_is_said_with_the_way_out():
    assert "run on a GPU, got device=cpu" in missing(torch.bfloat16, torch.device("cpu"), 16, 24)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "relu"}, r"activation must be one of swiglu, gelu, got 'relu'"),
        ({"rows_ND": torch.randn(8, 12)}, r"rows \(N, D\), up \(E, G, D\).* must fit, got \(8, 12\)"),
        ({"up_EGD": torch.randn(3, 24, 16)}, r"must fit, got .*\(3, 24, 16\).* with swiglu"),
        ({"copies": (torch.randn(3, 48, 16), torch.randn(3, 16, 24))}, r"are of fp32 weights, got .*; leave them out"),
        ({"down_EDF": torch.randn(3, 16, 24).half()}, r"must have one dtype, or .*, got .*float16; cast with"),
        ({"row_weights": RowWeights(torch.rand(2, 2), torch.arange(4).int())}, r"a weight per row, got \(2, 2\) for 8"),
        ({"sm_margin": -1}, r"sm_margin must not be negative, got sm_margin=-1"),
    ],
)
def test_bad_input_is_one_line(change, said):
    case = make_case([3, 0, 5], 16, 24, "swiglu", torch.float32)
    arguments = {
        "rows_ND": case.rows_ND,
        "up_EGD": case.up_EGD,
        "down_EDF": case.down_EDF,
        "expert_offsets": case.offsets,
    }
    with pytest.raises(ValueError, match=r"^ops.expert_ffn: .*" + said) as caught:
        expert_ffn(**arguments | change)
    assert "\n" not in str(caught.value)


def test_tokens_are_kept_in_place_of_the_rows_gathered_from_them():
    torch.manual_seed(0)
    tokens, top_k, width = 6, 2, 16
    case = make_case([3, 0, 5, 4], width, 24, "swiglu", torch.float32, top_k=top_k)
    x_TD = torch.randn(tokens, width, requires_grad=True)
    inverse_N = torch.empty_like(case.perm_N)
    inverse_N[case.perm_N.long()] = torch.arange(len(inverse_N), dtype=torch.int32)
    index = RoutingIndex(case.offsets, case.perm_N, inverse_N)
    upstream_ND = torch.randn(tokens * top_k, width)
    found = []
    for gathered in (None, Gathered(x_TD, index, top_k)):
        leaves = [x_TD, *(t.detach().clone().requires_grad_() for t in case[1:4])]
        rows_ND = permute(x_TD, index, top_k)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: (kept.append(t.shape), t)[1], lambda t: t):
            row_weights = RowWeights(leaves[3], case.perm_N, gathered)
            out_ND = expert_ffn(rows_ND, *leaves[1:3], case.offsets, "swiglu", row_weights)
        assert (rows_ND.shape in saved) == (gathered is None)
        found.append([out_ND, *torch.autograd.grad(out_ND, leaves, upstream_ND)])
    for actual, expected in zip(*found, strict=True):
        assert actual.equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights_get_the_fp32_sums(dtype, device):
    if device == "cuda" and (reason := missing(dtype, torch.device("cuda", 0), 64, 48)):
        pytest.skip(reason)
    case = make_case([30, 0, 150, 20], 64, 48, "swiglu", dtype, device)
    weights = [tensor.float().requires_grad_() for tensor in case[1:3]]
    row_weights, upstream_ND = RowWeights(case.weights_TK, case.perm_N), torch.randn_like(case.rows_ND)

    def gradients(**options):
        out_ND = expert_ffn(case.rows_ND, *weights, case.offsets, "swiglu", row_weights, **options)
        return torch.autograd.grad(out_ND, weights, upstream_ND, allow_unused=True)

    exact = plain(case, "swiglu", True, upstream_ND)[2:4]
    narrow = run(case, "swiglu", True, upstream_ND)[2:4]
    wide = gradients()
    for actual, rounded, right in zip(wide, narrow, exact, strict=True):
        assert actual.dtype == torch.float32
        assert actual.to(dtype).equal(rounded)
        assert not actual[1].any()  # no row
        assert (actual.double() - right).norm() <= (rounded.double() - right).norm()
    copies = tuple(weight.detach().to(dtype) for weight in weights)
    before = [torch.randn_like(weight) for weight in weights]
    added = [tensor.clone() for tensor in before]
    assert gradients(copies=copies, weight_grads=Added(*added)) == (None, None)
    for total, first, second in zip(added, before, wide, strict=True):
        assert total.equal(first + second)
