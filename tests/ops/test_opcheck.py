"""torch's own audit of every registered op: schema, fake tensors, autograd and AOT tracing."""

import pytest
import torch

from moe_lightning.ops import select

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


def test_every_op_is_checked():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "moe_lightning::" in name}
    assert names == {"select_forward", "select_backward", "build_index"}
