"""The same contract on a GPU, with what only a GPU has: streams, graphs, silence towards the host, many runs."""

from collections.abc import Iterator

import pytest
import torch
from ops_checks import (
    FLOATS,
    NEEDS_GPU,
    any_bits,
    check_grad_rounding,
    check_index,
    check_select,
    check_select_grad,
    views,
)

from moe_lightning.ops import build_index, permute, select, sinkhorn, unpermute

pytestmark = NEEDS_GPU


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Raise wherever torch would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def route(logits_TE, x_TD, top_k, implementation="auto"):
    """The whole op-level way of a token, forward."""
    selection = select(logits_TE, top_k, implementation)
    index = build_index(selection.expert_ids_TK, logits_TE.shape[1], implementation)
    rows_ND = permute(x_TD, index, top_k, may_drop=True)
    return selection, index, unpermute(rows_ND, selection.weights_TK, index, may_drop=True)


# Each bound of a kernel configuration, and its neighbours.
@pytest.mark.parametrize(
    "experts", [1, 2, 6, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 256, 257, 512, 513, 1023, 1024]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_grid(experts, dtype):
    for top_k in (1, 2, 8, 31, 32):
        if top_k <= experts:
            for tokens in (1, 33, 1000):
                check_select_grad(torch.randn(tokens, experts, device="cuda").to(dtype), top_k, "native")


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_tokens(dtype):
    logits_TE = torch.empty(0, 6, dtype=dtype, device="cuda", requires_grad=True)
    selection = check_select(logits_TE, 2, "native")
    selection.weights_TK.sum().backward()
    check_index(selection.expert_ids_TK, 6, "native")


def test_a_million_tokens():
    logits_TE = torch.randn(1_000_000, 8, device="cuda")
    selection = check_select(logits_TE, 2, "native")
    check_index(selection.expert_ids_TK, 8, "native")
    check_index(torch.randint(-1, 1024, (1_000_000, 8), device="cuda").int(), 1024, "native")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_hostile_logits(dtype, implementation):
    for experts, top_k in ((19, 1), (19, 19), (64, 2), (1024, 32)):
        check_select(any_bits(300, experts, dtype).cuda(), top_k, implementation)
        check_select(torch.zeros(300, experts, dtype=dtype, device="cuda"), top_k, implementation)
        check_select(torch.randint(0, 2, (300, experts), device="cuda").to(dtype), top_k, implementation)
        signed_zeros = torch.where(torch.rand(300, experts, device="cuda") < 0.5, 0.0, -0.0)
        check_select(signed_zeros.to(dtype), top_k, implementation)
    masked_TE = torch.randn(300, 64, device="cuda").to(dtype)
    masked_TE[:, 2:63] = -torch.inf
    assert check_select(masked_TE, 3, implementation).invalid_rows.item() == 0
    assert check_select(masked_TE, 4, implementation).invalid_rows.item() == 300


@pytest.mark.parametrize("dtype", FLOATS)
def test_views(dtype):
    for logits_TE in views(dtype, "cuda").values():
        check_select_grad(logits_TE, 3, "native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_round_as_torch_does(dtype):
    check_grad_rounding(dtype, "cuda")


@pytest.mark.parametrize("experts", [1, 7, 64, 1000, 1024])
@pytest.mark.parametrize("tokens", [1, 33, 5000])
def test_index(experts, tokens):
    for top_k in (1, 2, 8):
        check_index(torch.randint(experts, (tokens, top_k), device="cuda").int(), experts, "native")
    for stray in (-1, experts, 2**31 - 1, -(2**31)):
        ids_TK = torch.randint(experts, (tokens, 2), device="cuda").int()
        ids_TK[torch.rand(tokens, 2, device="cuda") < 0.3] = stray
        check_index(ids_TK, experts, "native")
    check_index(torch.full((tokens, 2), experts - 1, device="cuda").int(), experts, "native")
    check_index(torch.randint(experts, (2, tokens), device="cuda").int().t(), experts, "native")


@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_the_host_never_waits(implementation, no_sync):
    logits_TE = torch.randn(512, 64, device="cuda", requires_grad=True)
    x_TD = torch.randn(512, 32, device="cuda", requires_grad=True)
    *_, y_TD = route(logits_TE, x_TD, 2, implementation)
    y_TD.sum().backward()
    sinkhorn(logits_TE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_250_runs_give_the_same_bits(dtype):
    logits_TE = torch.randn(2000, 64, device="cuda").to(dtype).requires_grad_()
    x_TD = torch.randn(2000, 128, device="cuda").to(dtype).requires_grad_()
    upstream_TD = torch.randn_like(x_TD)

    def run():
        selection, index, y_TD = route(logits_TE, x_TD, 4, "native")
        return *selection, *index, y_TD, *torch.autograd.grad(y_TD, (logits_TE, x_TD), upstream_TD)

    first = [t.detach() for t in run()]
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(250):
        for a, b in zip(first, run(), strict=True):
            same &= (a == b).all()
    assert same.item()


def test_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        logits_TE = torch.zeros(4096, 64, device="cuda")
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would see the zeros
        logits_TE.copy_(torch.randn(4096, 64, device="cuda"))
        selection = select(logits_TE, 2, "native")
        index = build_index(selection.expert_ids_TK, 64, "native")
    torch.cuda.current_stream().wait_stream(stream)
    expected = check_select(logits_TE, 2, "native")
    assert all(torch.equal(a, b) for a, b in zip(selection, expected, strict=True))
    expected_index = check_index(expected.expert_ids_TK, 64, "native")
    assert all(torch.equal(a, b) for a, b in zip(index, expected_index, strict=True))


def test_graph_capture_and_replay():
    logits_TE = torch.randn(777, 48, device="cuda", requires_grad=True)
    x_TD = torch.randn(777, 16, device="cuda", requires_grad=True)

    def step():
        selection, index, y_TD = route(logits_TE, x_TD, 3, "native")
        return *selection, *index, y_TD, *torch.autograd.grad(y_TD.sum(), (logits_TE, x_TD))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            logits_TE.copy_(torch.randn_like(logits_TE))
            x_TD.copy_(torch.randn_like(x_TD))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        check_select(logits_TE, 3, "native")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    with torch.cuda.device(0):
        logits_TE = torch.randn(500, 64, device="cuda:1", requires_grad=True)
        check_select_grad(logits_TE, 2, "native")
        check_index(torch.randint(64, (500, 2), device="cuda:1").int(), 64, "native")
        assert torch.cuda.current_device() == 0
