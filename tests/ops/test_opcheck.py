"""torch's own audit of every registered op: schema, fake tensors, autograd and AOT tracing."""

import pytest
import torch

from moe_lightning.ops import build_index, select

OPS = torch.ops.moe_lightning
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_select(dtype, tokens):
    logits_TE = torch.randn(tokens, 6).to(dtype)
    torch.library.opcheck(OPS.select_forward.default, (logits_TE, 2))
    selection = select(logits_TE, 2)
    grad_TK = torch.randn_like(selection.weights_TK)
    backward = (grad_TK, selection.weights_TK, selection.expert_ids_TK, 6, dtype)
    torch.library.opcheck(OPS.select_backward.default, backward)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_build_index(tokens):
    ids_TK = torch.randint(-1, 6, (tokens, 2)).int()
    torch.library.opcheck(OPS.build_index.default, (ids_TK, 6))


@pytest.mark.parametrize("may_drop", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_movement(dtype, tokens, may_drop):
    offsets, perm_N, inverse_N = build_index(torch.randint(-1, 6, (tokens, 2)).int(), 6)
    x_TD, rows_ND, weights_TK = torch.randn(tokens, 4), torch.randn(2 * tokens, 4).to(dtype), torch.rand(tokens, 2)
    x_TD = x_TD.to(dtype)
    torch.library.opcheck(OPS.permute.default, (x_TD, perm_N, 2))
    torch.library.opcheck(OPS.permute_backward.default, (rows_ND, offsets, inverse_N, 2, may_drop))
    torch.library.opcheck(OPS.unpermute.default, (rows_ND, weights_TK, offsets, inverse_N, may_drop))
    backward = (x_TD, rows_ND, weights_TK, offsets, perm_N, inverse_N, may_drop)
    torch.library.opcheck(OPS.unpermute_backward.default, backward)


def test_every_op_is_checked():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "moe_lightning::" in name}
    movement = {"permute", "permute_backward", "unpermute", "unpermute_backward"}
    assert names == {"select_forward", "select_backward", "build_index"} | movement
