"""Rows 1, 2, 7, 10, 11, 12 of the catalogue: the order, for every router in evaluation."""

import pytest
import torch
from router_reference import check_legal, make, naive_ids, naive_weights, ranked_router, softmax_router

from moe_lightning.ops import native
from moe_lightning.routers import ROUTERS

GRID = [
    (tokens, experts, top_k)
    for experts in (2, 6, 8, 64, 100, 256, 1024, 1025)
    for top_k in (1, 2, 8, 32)
    for tokens in (1, 33)
    if top_k <= experts
]


def check_order(name: str, logits_TE: torch.Tensor, top_k: int) -> None:
    selection = make(name, logits_TE.shape[1], top_k).select(logits_TE)
    expected = naive_ids(logits_TE, top_k)
    assert selection.expert_ids_TK.tolist() == expected
    check_legal(selection, logits_TE, top_k)
    weights_TK = naive_weights(logits_TE, expected, name)
    torch.testing.assert_close(selection.weights_TK.double(), weights_TK, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:ops.select. using the slower torch reference")
@softmax_router  # sigmoids that lie close are rounded to one in either order
def test_ids_and_weights_over_the_grid(name):
    for tokens, experts, top_k in GRID:
        check_order(name, torch.randn(tokens, experts), top_k)


@ranked_router
def test_a_thousand_rows(name):
    check_order(name, torch.randn(1000, 60), 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@ranked_router
def test_dtypes(name, dtype):
    check_order(name, torch.randn(33, 64).to(dtype), 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@ranked_router
def test_ties_go_to_the_lower_id(name, dtype):
    ids = make(name, 8, 3).select(torch.zeros(2, 8, dtype=dtype)).expert_ids_TK
    assert ids.tolist() == [[0, 1, 2]] * 2
    check_order(name, torch.randint(0, 2, (33, 100)).to(dtype), 32)


@ranked_router
def test_negative_zero_ties_with_zero(name):
    ids = make(name, 6, 6).select(torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0, 1.0]])).expert_ids_TK
    assert ids.tolist() == [[5, 0, 1, 3, 4, 2]]


@ranked_router
def test_crowded_half_precision_is_the_same_on_100_runs(name):
    logits_TE = torch.randn(9, 1024).bfloat16()
    router = make(name, 1024, 32)
    first = router.select(logits_TE)
    assert first.expert_ids_TK.tolist() == naive_ids(logits_TE, 32)
    for _ in range(100):
        again = router.select(logits_TE.clone())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("scale", [100.0, 1e4, 3e38])
@softmax_router
def test_huge_logits(name, scale):
    check_order(name, (torch.randn(33, 64) * 0.3).clamp(-1, 1) * scale, 8)


@ranked_router
def test_non_contiguous_logits(name):
    base = torch.randn(65, 66)
    views = {
        "transposed": base[:, :64].T,
        "every second column": base[:33, ::2],
        "every second row": base[::2, :64],
        "misaligned": base.flatten()[1 : 1 + 33 * 64].view(33, 64),
        "row repeated": base[:1, :64].expand(33, 64),
        "column repeated": base[:33, :1].expand(33, 64),
    }
    for what, logits_TE in views.items():
        left_alone = logits_TE.clone()
        check_order(name, logits_TE, 8)
        assert logits_TE.equal(left_alone), what


def test_beyond_the_kernels_limits_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"num_experts <= 1024, .* got num_experts=1025, top_k=2, n_group=1"):
        ROUTERS["fused_select"](16, 1025, 2).select(torch.randn(3, 1025))
