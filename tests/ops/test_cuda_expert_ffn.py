"""The expert kernels on a GPU: against fp64 and torch's own error; empty experts, dropped slots, determinism."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ffn_cases import make_case, plain, run
from ops_checks import NEEDS_GPU

from moe_lightning.ops import Gathered, RowWeights, build_index, expert_ffn, native, permute, sum_rows
from moe_lightning.ops.expert_ffn import missing

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.skipif(
        bool(
            torch.cuda.is_available()
            and native.missing("cuda") is None
            and missing(torch.bfloat16, torch.device("cuda", 0), 64, 64)
        ),
        reason="the expert kernels are not built, or not for this GPU",
    ),
]
HALVES = (torch.bfloat16, torch.float16)
#: rows per expert: few, none in some, a tile and a bit, many in one.
COUNTS = ([3, 0, 5, 2], [0, 0, 0, 130], [700, 0, 0, 0], [129, 64, 1, 256], [20] * 70)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)}x{max(counts)}")
@pytest.mark.parametrize(("d_model", "hidden_dim"), [(64, 128), (264, 328), (512, 256)])
def test_as_near_to_fp64_as_torch(d_model, hidden_dim, counts, weighted, activation, dtype):
    dropped = 6 if weighted else 0
    case = make_case(counts, d_model, hidden_dim, activation, dtype, "cuda", dropped)
    upstream_ND = torch.randn_like(case.rows_ND)
    exact = plain(case, activation, weighted, upstream_ND)
    theirs = plain(case, activation, weighted, upstream_ND, dtype)
    case.rows_ND[int(case.offsets[-1]) :] = torch.nan
    actual = run(case, activation, weighted, upstream_ND)
    for ours, own, right in zip(actual, theirs, exact, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - right).norm() <= 2 * (own.double() - right).norm() + 1e-5 * (1 + right.norm())


@pytest.mark.parametrize("dtype", HALVES)
def test_small_integers_are_exact(dtype):
    """GELU of large values is the value itself (or 0), so sums of products of small integers stay exact."""
    case = make_case([40, 0, 170, 14], 64, 72, "gelu", dtype, "cuda")
    with torch.no_grad():
        case.rows_ND.copy_(torch.randint(0, 3, case.rows_ND.shape))
        case.up_EGD.copy_(16 * torch.randint(0, 2, case.up_EGD.shape))
        case.up_EGD[:, :, 8:] = 0
        case.down_EDF.copy_(torch.randint(-1, 2, case.down_EDF.shape))
        case.down_EDF[:, :, 8:] = 0
    out_ND = expert_ffn(*case[:3], case.offsets, "gelu")
    expected = plain(case, "gelu", False, torch.ones_like(case.rows_ND))[0]
    assert torch.equal(out_ND.double(), expected.to(dtype).double())


def test_an_expert_without_rows_has_gradients_of_exactly_zero():
    for counts in ([0, 5, 0, 200], [0, 0, 7], [9, 0, 0], [0, 0]):
        case = make_case(counts, 64, 128, "swiglu", torch.bfloat16, "cuda", dropped=sum(counts) % 2)
        _, _, grad_up, grad_down, _ = run(case, "swiglu", True, torch.randn_like(case.rows_ND))
        empty = [e for e, count in enumerate(counts) if not count]
        assert grad_up[empty].eq(0).all()
        assert grad_down[empty].eq(0).all()


def test_the_same_bits_on_every_run():
    case = make_case([130, 0, 300, 70], 256, 384, "swiglu", torch.bfloat16, "cuda")
    upstream_ND = torch.randn_like(case.rows_ND)
    first = run(case, "swiglu", True, upstream_ND)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(run(case, "swiglu", True, upstream_ND), first, strict=True))


@pytest.mark.parametrize("sm_margin", [1, 24, 10_000])
def test_an_sm_margin_gives_the_same_bits(sm_margin):
    """On fewer blocks, one at least; the next call without a margin has all of them again."""
    case = make_case([130, 0, 300, 70], 256, 384, "swiglu", torch.bfloat16, "cuda")
    upstream_ND = torch.randn_like(case.rows_ND)
    expected = run(case, "swiglu", True, upstream_ND)
    for margin in (sm_margin, 0):
        actual = run(case, "swiglu", True, upstream_ND, sm_margin=margin)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_captured_and_replayed_with_other_offsets():
    """Offsets are read on the device: a graph follows them."""
    one, other = (make_case(c, 64, 128, "swiglu", torch.bfloat16, "cuda") for c in ([100, 20, 0], [0, 20, 100]))
    inputs = [t.clone() for t in one]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expert_ffn(*inputs[:3], inputs[4], "swiglu", RowWeights(inputs[3], inputs[5]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = expert_ffn(*inputs[:3], inputs[4], "swiglu", RowWeights(inputs[3], inputs[5]))
    for case in (one, other):
        for buffer, tensor in zip(inputs, case, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        expected = expert_ffn(*case[:3], case.offsets, "swiglu", RowWeights(case.weights_TK, case.perm_N))
        assert torch.equal(captured, expected)


def test_never_waits_for_the_device():
    case = make_case([100, 20, 0], 64, 128, "swiglu", torch.bfloat16, "cuda")
    leaves = [t.requires_grad_() for t in case[:4]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_ND = expert_ffn(*leaves[:3], case.offsets, "swiglu", RowWeights(leaves[3], case.perm_N))
        out_ND.backward(torch.ones_like(out_ND))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_whole():
    case = make_case([100, 20, 0], 64, 128, "swiglu", torch.bfloat16, "cuda")
    expected = expert_ffn(*case[:3], case.offsets)
    assert torch.equal(torch.compile(expert_ffn, fullgraph=True)(*case[:3], case.offsets), expected)


def test_a_thread_that_has_not_used_the_gpu_before():
    """Its memory comes from the cache, so that nothing before the kernels has made a CUDA context current in it."""
    case = make_case([100, 20, 0], 64, 128, "swiglu", torch.bfloat16, "cuda")
    expected = expert_ffn(*case[:3], case.offsets)
    with ThreadPoolExecutor(1) as threads:
        assert torch.equal(threads.submit(expert_ffn, *case[:3], case.offsets).result(), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_buffer_takes_the_same_bits(weighted):
    case = make_case([129, 0, 1, 70], 64, 136, "swiglu", torch.bfloat16, "cuda", dropped=6)
    upstream_ND, buffer_ND = torch.randn_like(case.rows_ND), torch.full_like(case.rows_ND, torch.nan)
    plainly = run(case, "swiglu", weighted, upstream_ND)
    for actual, expected in zip(run(case, "swiglu", weighted, upstream_ND, buffer_ND), plainly, strict=True):
        assert actual.equal(expected)


def test_backward_of_gathered_rows_takes_one_tensor_of_their_size():
    tokens, top_k, experts, d_model, hidden_dim = 2048, 4, 8, 512, 256
    x_TD = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    shapes = (experts, 2 * hidden_dim, d_model), (experts, d_model, hidden_dim)
    up, down = (0.05 * torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    weights_TK = torch.rand(tokens, top_k, device="cuda").requires_grad_()
    leaves = x_TD, up.requires_grad_(), down.requires_grad_(), weights_TK
    ids_TK = torch.rand(tokens, experts, device="cuda").topk(top_k).indices.int()
    index = build_index(ids_TK, experts)
    upstream_TD = torch.randn_like(x_TD)

    def output(gathers):
        rows_ND = permute(x_TD, index, top_k)
        gathered = Gathered(x_TD, index, top_k) if gathers else None
        row_weights = RowWeights(weights_TK, index.perm_N, gathered)
        return sum_rows(expert_ffn(rows_ND, up, down, index.expert_offsets, "swiglu", row_weights), index, top_k)

    def gradients(y_TD, retain):
        return torch.autograd.grad(y_TD, leaves, upstream_TD, retain_graph=retain)

    expected = gradients(output(False), False)
    y_TD = output(True)
    found = [gradients(y_TD, True), gradients(y_TD, True)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found.append(gradients(y_TD, False))
    taken = torch.cuda.max_memory_allocated() - before
    for each in found:
        for actual, right in zip(each, expected, strict=True):
            assert actual.equal(right)
    rows, hidden, weights = (
        2 * count for count in (tokens * top_k * d_model, tokens * top_k * hidden_dim, up.numel() + down.numel())
    )
    assert taken < rows + hidden + weights + 2 * tokens * d_model * 2  # hidden: of h; none of its own gradient
