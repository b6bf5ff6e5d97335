"""torch's own audit of every registered op: schema, fake tensors, autograd and AOT tracing."""

import pytest
import torch
from ffn_cases import make_case
from ops_checks import DEVICES, FLOATS, WEIGHTINGS

import moe_lightning.export.operators  # noqa: F401  registers its op
from moe_lightning.ops import build_index, select
from moe_lightning.ops.select import GAP_BINS, Rule

OPS = torch.ops.moe_lightning
#: Every dtype; the edges, no token and one, in one of them.
TOKENS = [*((7, dtype) for dtype in FLOATS), (0, torch.float32), (1, torch.float32)]


def opcheck(name, *arguments):
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "dtype"), TOKENS)
@pytest.mark.parametrize("how", WEIGHTINGS, ids=str)
def test_select(how, dtype, tokens, device):
    logits_TE = torch.randn(tokens, 6, device=device).to(dtype)
    bias_E, scores_TE = torch.randn(6, device=device), torch.randn(tokens, 6, device=device)
    mask_T, gap_counts_BE = torch.rand(tokens, device=device) < 0.5, torch.zeros(GAP_BINS, 6, device=device)
    for rule in (
        Rule(*how),
        Rule(*how, scores_TE=scores_TE),
        Rule(*how, 2.5, bias_E, n_group=3, topk_group=2, mask_T=mask_T),
    ):
        opcheck("select_forward", logits_TE, 2, *rule[:-1])
    rule = Rule(*how, 2.5, bias_E, mask_T=mask_T, gap_counts_BE=gap_counts_BE)
    opcheck("select_and_count_gaps", logits_TE, 2, *rule)
    weights_TK, ids_TK, *_ = select(logits_TE, 2, score=how[0], renormalize=how[1])
    opcheck("select_backward", torch.randn_like(weights_TK), logits_TE, weights_TK, ids_TK, 6, dtype, *how, 2.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_build_index(tokens, device):
    opcheck("build_index", torch.randint(-1, 6, (tokens, 2), device=device).int(), 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("may_drop", [False, True])
@pytest.mark.parametrize(("tokens", "dtype"), TOKENS)
def test_movement(dtype, tokens, may_drop, device):
    offsets, perm_N, inverse_N = build_index(torch.randint(-1, 6, (tokens, 2), device=device).int(), 6)
    x_TD, rows_ND = (torch.randn(n, 4, device=device).to(dtype) for n in (tokens, 2 * tokens))
    weights_TK = torch.rand(tokens, 2, device=device)
    opcheck("permute", x_TD, perm_N, inverse_N, 2)
    opcheck("permute_backward", rows_ND, offsets, inverse_N, 2, may_drop)
    opcheck("unpermute", rows_ND, weights_TK, offsets, inverse_N, may_drop)
    opcheck("unpermute_backward", x_TD, rows_ND, weights_TK, offsets, perm_N, inverse_N, may_drop)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "dtype"), TOKENS)
def test_sinkhorn(dtype, tokens, device):
    opcheck("sinkhorn", torch.randn(tokens, 6, device=device).to(dtype), 3, 1.0, 0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("counts", "dtype"), [*(([3, 5], dtype) for dtype in FLOATS), ([0, 0], torch.float32)])
def test_expert_ffn(counts, dtype, activation, weighted, device):
    case = make_case(counts, 8, 16, activation, dtype, device)
    row_weights = (case.weights_TK, case.perm_N) if weighted else (None, None)
    arguments = *case[:3], case.offsets, *row_weights, activation
    opcheck("expert_ffn", *arguments, False, 0)
    opcheck("expert_ffn", *arguments, True, 0)
    hidden_NG = torch.randn(len(case.rows_ND), case.up_EGD.shape[1], device=device).to(dtype)
    for needs in (
        (False, True, True, True),
        (False, True, False, False),
        (dtype in (torch.bfloat16, torch.float16), True, True, True),
    ):
        opcheck("expert_ffn_backward", torch.randn_like(case.rows_ND), *case[:3], hidden_NG, *arguments[3:], *needs, 0)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_expert_loop(activation):
    ids_TK = torch.tensor([[0, 2], [2, -1], [0, 2]]).int()  # expert 1 has no token
    ups = [torch.randn(12, 5) for _ in range(3)]
    downs = [torch.randn(5, 6 if activation == "swiglu" else 12) for _ in range(3)]
    opcheck("expert_loop", torch.randn(3, 5), ids_TK, torch.rand(3, 2), ups, downs, activation)


def test_every_op_is_checked():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "moe_lightning::" in name}
    movement = {"permute", "permute_backward", "unpermute", "unpermute_backward"}
    experts = {"expert_ffn", "expert_ffn_backward"}
    selection = {"select_forward", "select_and_count_gaps", "select_backward"}
    assert names == selection | {"build_index", "sinkhorn", "expert_loop"} | movement | experts
