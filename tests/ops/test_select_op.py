"""Select: the order contract, the invalid-row rule and the gradient, native and reference alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_checks import (
    FLOATS,
    any_bits,
    check_grad_rounding,
    check_select,
    check_select_grad,
    views,
)

from moe_lightning.ops import select

SPECIALS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40)
both = pytest.mark.parametrize("implementation", ["native", "torch"])


@both
@pytest.mark.parametrize("experts", [1, 2, 6, 8, 64, 100, 256, 1023, 1024])
@pytest.mark.parametrize("top_k", [1, 2, 8, 32])
def test_grid(experts, top_k, implementation):
    if top_k > experts:
        pytest.skip("top_k > num_experts is an error, tested apart")
    for tokens in (1, 33, 1000):
        check_select_grad(torch.randn(tokens, experts), top_k, implementation)


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (100, 4), (16, 16)])
def test_dtypes_and_k_equal_e(dtype, experts, top_k, implementation):
    check_select_grad(torch.randn(200, experts).to(dtype), top_k, implementation)


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_tokens(dtype, implementation):
    logits_TE = torch.empty(0, 6, dtype=dtype, requires_grad=True)
    selection = check_select(logits_TE, 2, implementation)
    selection.weights_TK.sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.shape == (0, 6)


@both
def test_one_expert_has_weight_exactly_one(implementation):
    assert select(torch.tensor([[-7.3]]), 1, implementation).weights_TK.item() == 1.0


@both
@pytest.mark.parametrize(
    ("dtype", "experts", "top_k"),
    [(torch.float32, 64, 8), (torch.bfloat16, 1024, 32), (torch.float16, 6, 2), (torch.float64, 100, 32)],
)
def test_ties_go_to_the_lower_id_on_every_run(dtype, experts, top_k, implementation):
    rows = [
        torch.zeros(8, experts),
        torch.randint(0, 2, (8, experts)).float(),
        torch.where(torch.rand(8, experts) < 0.5, 0.0, -0.0),
        torch.full((8, experts), -torch.inf),
        torch.randn(8, experts).bfloat16().float(),
    ]
    logits_TE = torch.cat(rows).to(dtype)
    first = check_select(logits_TE, top_k, implementation)
    for _ in range(100):
        again = select(logits_TE, top_k, implementation)
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(first, again, strict=True))


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_poison_their_row_only(dtype, bad, implementation):
    logits_TE = torch.randn(6, 10).to(dtype)
    logits_TE[1, 3] = bad
    logits_TE[4] = bad
    selection = check_select(logits_TE, 3, implementation)
    assert selection.invalid_rows.item() == 2
    assert selection.weights_TK.isnan().all(1).tolist() == [False, True, False, False, True, False]
    logits_TE[:] = bad
    assert check_select(logits_TE, 3, implementation).invalid_rows.item() == 6


@both
def test_gradient_of_an_invalid_row_is_nan_and_stays_there(implementation):
    logits_TE = torch.randn(3, 5)
    logits_TE[1, 2] = torch.nan
    logits_TE.requires_grad_()
    select(logits_TE, 2, implementation).weights_TK.square().sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isnan().any(1).tolist() == [False, True, False]


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_inf_is_a_mask_while_k_experts_stay(dtype, implementation):
    logits_TE = torch.randn(2, 9).to(dtype)
    logits_TE[0, [0, 1, 2, 4, 5, 8]] = -torch.inf  # E - K masked: legal
    logits_TE[1, [0, 1, 2, 4, 5, 7, 8]] = -torch.inf  # one more: not
    selection = check_select(logits_TE, 3, implementation)
    assert sorted(selection.expert_ids_TK[0].tolist()) == [3, 6, 7]
    assert selection.invalid_rows.item() == 1


@both
@pytest.mark.parametrize("scale", [1e4, 3e38, 100.0, 1e-42])
def test_huge_and_tiny_logits(scale, implementation):
    logits_TE = (torch.randn(100, 64) if scale == 100 else torch.rand(100, 64) * 2 - 1) * scale
    assert check_select(logits_TE, 4, implementation).invalid_rows.item() == 0


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("top_k", [1, 2, 19])
def test_any_bits(dtype, top_k, implementation):
    check_select(any_bits(400, 19, dtype), top_k, implementation)


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_views(dtype, implementation):
    for logits_TE in views(dtype, "cpu").values():
        check_select_grad(logits_TE, 3, implementation)


def test_every_half_value_is_read_right():
    for dtype in (torch.float16, torch.bfloat16):
        value_T = torch.arange(-(2**15), 2**15).short().view(dtype)
        check_select(torch.stack([value_T, torch.zeros_like(value_T)], 1), 2, "native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_round_as_torch_does(dtype):
    check_grad_rounding(dtype, "cpu")


@both
def test_gradcheck(implementation):
    logits_TE = (torch.randperm(7 * 9).double() / 9).view(7, 9).requires_grad_()  # no ties
    assert torch.autograd.gradcheck(lambda x: select(x, 3, implementation).weights_TK, (logits_TE,))


@settings(max_examples=150)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 70),
    dtype=st.sampled_from(FLOATS),
    share=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_property(tokens, experts, dtype, share, seed, data):
    top_k = data.draw(st.integers(1, min(experts, 32)))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator).mul(3).round()
    special_TE = torch.tensor(SPECIALS)[torch.randint(len(SPECIALS), logits_TE.shape, generator=generator)]
    logits_TE = torch.where(torch.rand(logits_TE.shape, generator=generator) < share, special_TE, logits_TE)
    for implementation in ("native", "torch"):
        check_select(logits_TE.to(dtype), top_k, implementation)


def test_threads_do_not_change_the_bits():
    logits_TE = torch.randn(20_000, 64)
    logits_TE[::1000, 5] = torch.nan
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = select(logits_TE, 2, "native")
        torch.set_num_threads(5)
        five = check_select(logits_TE, 2, "native")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(one, five, strict=True))


def test_compiles_whole():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits_TE):
        return select(logits_TE, 2)

    for tokens in (5, 9, 1):
        logits_TE = torch.randn(tokens, 6, requires_grad=True)
        compiled, eager = step(logits_TE), select(logits_TE, 2)
        assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
        (compiled_grad,) = torch.autograd.grad(compiled.weights_TK[:, 0].sum(), logits_TE)
        (eager_grad,) = torch.autograd.grad(eager.weights_TK[:, 0].sum(), logits_TE)
        assert torch.equal(compiled_grad, eager_grad)
