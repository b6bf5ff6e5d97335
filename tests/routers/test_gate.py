"""fp32 logits of bf16 tokens."""

import pytest
import torch
from torch.nn import functional as F

from moe_lightning.routers.gate import linear_fp32

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize(("tokens", "width", "experts"), [(0, 16, 4), (1, 16, 1), (300, 128, 6), (513, 1024, 64)])
def test_logits_and_gradients_are_as_exact_as_in_fp32(device, tokens, width, experts):
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    weight_ED = (0.02 * torch.randn(experts, width, device=device)).requires_grad_()
    upstream_TE = torch.randn(tokens, experts, device=device) / max(tokens, 1)
    exact = F.linear(x_TD.double(), weight_ED.double())
    exact_x, exact_weight = torch.autograd.grad(exact, (x_TD, weight_ED), upstream_TE.double())
    in_fp32 = F.linear(x_TD.float(), weight_ED)
    [fp32_weight] = torch.autograd.grad(in_fp32, weight_ED, upstream_TE)
    with torch.autocast(device, torch.bfloat16):
        logits_TE = linear_fp32(x_TD, weight_ED)
        grad_x, grad_weight = torch.autograd.grad(logits_TE, (x_TD, weight_ED), upstream_TE)
    assert (logits_TE.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for actual, theirs, right in ((logits_TE, in_fp32, exact), (grad_weight, fp32_weight, exact_weight)):
        assert (actual.double() - right).norm() <= 2 * (theirs.double() - right).norm() + 1e-6 * right.norm()
    # Both are rounded to bf16, half of its last bit off at the most.
    assert (grad_x.double() - exact_x.double()).norm() <= 2**-8 * exact_x.double().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_tokens_are_multiplied_as_they_are(dtype):
    torch.manual_seed(0)
    x_TD, weight_ED = torch.randn(8, 16).to(dtype), torch.randn(4, 16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert linear_fp32(x_TD, weight_ED).equal(F.linear(x_TD.to(wide), weight_ED.to(wide)))
