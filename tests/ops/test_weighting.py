"""Every way of making weights, and of ranking by something else than the logits."""

import pytest
import torch
from ops_checks import DEVICES, FLOATS, WEIGHTINGS, check_ranks, check_sigmoid_bias, check_weighting, views

from moe_lightning.ops import select

IMPLEMENTATIONS = ["native", "torch"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", WEIGHTINGS, ids=str)
def test_weights_and_gradients(how, dtype, implementation, device):
    for experts in (1, 6, 8, 19, 64, 100, 256, 1000):
        for top_k in (1, 3, 8, 32):
            if top_k <= experts:
                check_weighting(torch.randn(33, experts, device=device).to(dtype), top_k, implementation, how)
    for logits_TE in views(dtype, device).values():
        check_weighting(logits_TE, 3, implementation, how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_and_ranks_choose(dtype, implementation, device):
    check_ranks(dtype, device, implementation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_on_sigmoids(dtype, implementation, device):
    check_sigmoid_bias(dtype, device, implementation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", WEIGHTINGS, ids=str)
def test_extreme_logits_stay_finite(how, implementation, device):
    logits_TE = torch.tensor([[3e38, -3e38, 0.0], [-200.0, -200.0, -200.0], [200.0, 200.0, 200.0]], device=device)
    logits_TE.requires_grad_()
    weights_TK = select(logits_TE, 2, implementation, score=how[0], renormalize=how[1]).weights_TK
    (grad_TE,) = torch.autograd.grad(weights_TK.square().sum(), logits_TE)
    assert weights_TK.isfinite().all()
    assert grad_TE.isfinite().all()
