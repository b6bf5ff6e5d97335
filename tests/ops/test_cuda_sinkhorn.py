"""Sinkhorn on a GPU against the CPU's: every size of team, every dtype, hostile rows, and the same bits each time."""

import pytest
import torch
from ops_checks import NEEDS_GPU

from moe_lightning.ops import sinkhorn

pytestmark = NEEDS_GPU

# One block, clusters of 2 to 16, a grid that keeps the matrix, a grid that does not; widths of every kernel.
SIZES = [(1, 5), (31, 8), (300, 19), (1000, 64), (4096, 64), (5000, 100), (20_000, 64), (3000, 1000), (40_000, 256)]


def close(actual_TE, expected_TE, rtol=1e-4):
    """Relative to 1 + |score|: far below the maximum a log-score loses digits to its potential."""
    assert torch.equal(actual_TE.isnan(), expected_TE.isnan())
    assert torch.equal(actual_TE == -torch.inf, expected_TE == -torch.inf)
    finite_TE = expected_TE.isfinite()
    actual, expected = actual_TE[finite_TE], expected_TE[finite_TE]
    assert ((actual - expected).abs() <= rtol * (1 + expected.abs())).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_cpu(size, dtype):
    logits_TE = torch.randn(size).to(dtype)
    close(sinkhorn(logits_TE.cuda()).cpu(), sinkhorn(logits_TE))


@pytest.mark.parametrize("tokens", [300, 4096, 20_000, 400_000])
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_a_column_at_the_end_of_what_a_softmax_keeps(tokens, tolerance):
    """Its exponentials are subnormal numbers; one step must raise it by what it lacks and no more."""
    logits_TE = torch.tensor([0.0, -88.0]).expand(tokens, 2)
    scores_TE = sinkhorn(logits_TE.cuda(), 1, tolerance=tolerance).cpu()
    close(scores_TE, sinkhorn(logits_TE, 1, tolerance=tolerance), rtol=1e-3)


@pytest.mark.parametrize("size", [(300, 19), (4096, 64), (20_000, 64), (40_000, 256)], ids=str)
@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_masks_and_broken_rows(size, scale):
    logits_TE = torch.randn(size) * scale
    logits_TE[torch.rand(size) < 0.1] = -torch.inf
    logits_TE[:, -1] = -torch.inf  # an expert that no token may choose
    logits_TE[3], logits_TE[5, 2], logits_TE[7, 0] = -torch.inf, torch.nan, torch.inf
    close(sinkhorn(logits_TE.cuda()).cpu(), sinkhorn(logits_TE), rtol=1e-3)


@pytest.mark.parametrize("size", [(4096, 64), (20_000, 64)], ids=str)
def test_stops_at_the_tolerance(size):
    logits_TE = 3 * torch.randn(size)
    for tolerance in (0.5, 0.05):
        stopped_TE = sinkhorn(logits_TE.cuda(), 100, tolerance=tolerance).cpu()
        close(stopped_TE, sinkhorn(logits_TE, 100, tolerance=tolerance))
        assert not torch.equal(stopped_TE, sinkhorn(logits_TE.cuda(), 100).cpu())


def test_views():
    logits_TE = torch.randn(66, 40)
    for view in (logits_TE.t(), logits_TE[::2], logits_TE[:, 7:19], logits_TE[:, ::2], logits_TE[:1].expand(33, 40)):
        close(sinkhorn(view.cuda()).cpu(), sinkhorn(view))


def test_no_tokens():
    assert sinkhorn(torch.empty(0, 6, device="cuda")).shape == (0, 6)


@pytest.mark.parametrize("size", [(4096, 64), (20_000, 64), (140_000, 64)], ids=str)
def test_250_runs_and_a_graph_give_the_same_bits(size):
    logits_TE = torch.randn(size, device="cuda")
    first_TE = sinkhorn(logits_TE)
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(250):
        same &= (sinkhorn(logits_TE) == first_TE).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_TE = sinkhorn(logits_TE)
    for _ in range(3):
        graph.replay()
        same &= (captured_TE == first_TE).all()
    assert same.item()
