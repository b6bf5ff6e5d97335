"""Sinkhorn: marginals, invariance, and rows that must not spoil the others."""

import numpy as np
import pytest
import torch

from moe_lightning.ops import sinkhorn


def classic(logits_TE: torch.Tensor, iterations: int) -> np.ndarray:
    """The textbook loop in fp64: rows, columns, and rows once more."""
    plan_TE = np.exp(logits_TE.double().numpy())
    for _ in range(iterations):
        plan_TE /= plan_TE.sum(1, keepdims=True)
        plan_TE *= plan_TE.shape[0] / plan_TE.shape[1] / plan_TE.sum(0, keepdims=True)
    return plan_TE / plan_TE.sum(1, keepdims=True)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_the_textbook_loop(iterations):
    logits_TE = torch.randn(100, 12)
    balanced_TE = sinkhorn(logits_TE, iterations).exp().double().numpy()
    np.testing.assert_allclose(balanced_TE, classic(logits_TE, iterations), rtol=2e-5)
    halved_TE = sinkhorn(logits_TE, iterations, temperature=0.5).exp().double().numpy()
    np.testing.assert_allclose(halved_TE, classic(logits_TE * 2, iterations), rtol=2e-5)


def test_marginals_at_4096_by_64():
    plan_TE = sinkhorn(torch.randn(4096, 64), iterations=10).exp()
    assert (plan_TE.sum(1) - 1).abs().max() < 1e-5  # the side that is exact
    assert (plan_TE.sum(0) / 64 - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_constant_shift_of_a_row_changes_nothing(dtype):
    logits_TE = torch.randint(-4, 5, (64, 8)).to(dtype)
    shift_T1 = torch.randint(-50, 50, (64, 1)).to(dtype)
    assert torch.equal(sinkhorn(logits_TE), sinkhorn(logits_TE + shift_T1))
    assert sinkhorn(logits_TE).dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("std", [1, 5, 10, 40])
def test_small_and_steep(tokens, std):
    plan_TE = sinkhorn(torch.randn(tokens, 8) * std).exp()
    assert plan_TE.isfinite().all()
    assert (plan_TE.sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("extreme", [89.0, -89.0, 1e4, 3e38, -3e38])
def test_extreme_logits_stay_finite_probabilities(extreme):
    logits_TE = torch.randn(16, 4)
    logits_TE[3, 1] = extreme
    logits_TE[5] = extreme
    plan_TE = sinkhorn(logits_TE, temperature=0.1).exp()
    assert plan_TE.isfinite().all()
    assert (plan_TE.sum(1) - 1).abs().max() < 1e-5


def test_bad_rows_do_not_touch_the_others():
    logits_TE = torch.randn(20, 6)
    bad = {2: torch.nan, 7: torch.inf, 11: -torch.inf}
    spoiled_TE = logits_TE.clone()
    for row, value in bad.items():
        spoiled_TE[row, 3] = value
    spoiled_TE[11] = -torch.inf
    good = [t for t in range(20) if t not in bad]
    balanced_TE = sinkhorn(spoiled_TE)
    torch.testing.assert_close(balanced_TE[good], sinkhorn(logits_TE[good]), rtol=1e-5, atol=1e-6)
    assert balanced_TE[[2, 7]].isnan().all()
    assert (balanced_TE[11] == -torch.inf).all()


def test_masks_stay_masks():
    logits_TE = torch.randn(64, 8)
    logits_TE[:, 5] = -torch.inf  # an expert nobody may use
    logits_TE[::3, 2] = -torch.inf
    balanced_TE = sinkhorn(logits_TE)
    assert torch.equal(balanced_TE == -torch.inf, logits_TE == -torch.inf)
    assert (balanced_TE.exp().sum(1) - 1).abs().max() < 1e-5


def test_no_tokens_and_no_gradient():
    assert sinkhorn(torch.empty(0, 4)).shape == (0, 4)
    assert not sinkhorn(torch.randn(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_TE": torch.randn(3)}, "must have shape"),
        ({"iterations": 0}, "iterations must be a positive integer below 2\\^31, got iterations=0"),
        ({"temperature": 0.0}, "temperature must be positive and finite in fp32, got temperature=0.0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**({"logits_TE": torch.randn(3, 4)} | arguments))
