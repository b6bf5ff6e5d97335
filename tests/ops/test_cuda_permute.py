"""Movement of rows on a GPU against the CPU's, forward and backward, in every shape a kernel treats apart."""

import pytest
import torch
from ops_checks import FLOATS, NEEDS_GPU

from moe_lightning.ops import build_index, permute, unpermute

pytestmark = NEEDS_GPU

ATOL = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def both_devices(ids_TK, x_TD, weights_TK, upstream_TD, may_drop):
    """Rows, the weighted sum of their halves, and the gradients, on each device."""
    for device in ("cpu", "cuda"):
        x, w = (t.detach().to(device).requires_grad_() for t in (x_TD, weights_TK))
        index = build_index(ids_TK.to(device), 6)
        rows_ND = permute(x, index, ids_TK.shape[1], may_drop)
        y_TD = unpermute(rows_ND / 2, w, index, may_drop)
        yield rows_ND.detach(), y_TD.detach(), *torch.autograd.grad(y_TD, (x, w), upstream_TD.to(device))


# Widths: of whole vectors, of one vector and a bit, odd, narrower than a vector.
@pytest.mark.parametrize("width", [1, 3, 8, 24, 100, 256, 1000, 4096])
@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("may_drop", [False, True])
def test_agrees_with_the_cpu(width, top_k, dtype, may_drop):
    for tokens in (1, 7, 300):
        ids_TK = torch.randint(-1 if may_drop else 0, 6, (tokens, top_k)).int()
        x_TD, upstream_TD = (torch.randn(tokens, width).to(dtype) for _ in range(2))
        cpu, cuda = both_devices(ids_TK, x_TD, torch.rand(tokens, top_k), upstream_TD, may_drop)
        assert torch.equal(cuda[0].cpu(), cpu[0])
        for actual, expected in zip(cuda[1:], cpu[1:], strict=True):
            assert actual.dtype == expected.dtype
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=ATOL[dtype] * scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_and_misaligned_rows(dtype):
    ids_TK, weights_TK = torch.randint(6, (50, 2)).int(), torch.rand(50, 2)
    wide_TD = torch.randn(50, 80).to(dtype)
    for x_TD in (wide_TD[:, 1:65], wide_TD[:, ::2], wide_TD.t()[:50, :50]):
        cpu, cuda = both_devices(ids_TK, x_TD, weights_TK, torch.randn(x_TD.shape).to(dtype), False)
        assert torch.equal(cuda[0].cpu(), cpu[0])
    index = build_index(ids_TK.cuda(), 6)
    offset_TD = torch.randn(50 * 64 + 1, device="cuda").to(dtype)[1:].view(50, 64)  # not at 16 bytes
    assert torch.equal(permute(offset_TD, index, 2), permute(offset_TD.clone(), index, 2))


def test_dropped_rows_are_not_read():
    ids_TK = torch.randint(-1, 6, (200, 2), device="cuda").int()
    index = build_index(ids_TK, 6)
    rows_ND = torch.randn(400, 64, device="cuda", requires_grad=True)
    with torch.no_grad():
        rows_ND[index.expert_offsets[-1] :] = torch.nan
    weights_TK = torch.rand(200, 2, device="cuda", requires_grad=True)
    y_TD = unpermute(rows_ND, weights_TK, index, may_drop=True)
    grad_rows_ND, grad_weights_TK = torch.autograd.grad(y_TD.sum(), (rows_ND, weights_TK))
    assert y_TD.isfinite().all()
    assert grad_rows_ND.isfinite().all()
    assert (grad_rows_ND[index.expert_offsets[-1] :] == 0).all()
    assert (grad_weights_TK[ids_TK < 0] == 0).all()
    assert grad_weights_TK.isfinite().all()
