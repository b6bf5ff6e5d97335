"""Counts that no launch clears: every stream and every captured graph must have a slot of counters of its own."""

import pytest
import torch
from ops_checks import NEEDS_GPU, check_select

from moe_lightning.bench.gpu_timers import count_launches
from moe_lightning.ops import select

pytestmark = NEEDS_GPU


def test_many_streams_at_once():
    logits_TE = torch.randn(3000, 64, device="cuda")
    expected = check_select(logits_TE, 2, "native")
    torch.cuda.synchronize()
    # torch has 32 streams per priority, each with a slot of counters: two priorities leave some for other tests.
    streams = [torch.cuda.Stream(priority=p) for p in torch.cuda.Stream.priority_range() for _ in range(32)]
    results = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(select(logits_TE, 2, "native"))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result.tokens_per_expert_E, expected.tokens_per_expert_E)
        assert torch.equal(result.expert_ids_TK, expected.expert_ids_TK)


def test_graphs_and_eager_calls_at_once():
    logits = [torch.randn(20_000, 64, device="cuda") for _ in range(4)]
    expected = [check_select(x, 2, "native") for x in logits]
    graphs, captured = [], []
    for x in logits:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(select(x, 2, "native"))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in logits]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [select(x, 2, "native") for x in logits]
        torch.cuda.synchronize()
        for results in (captured, eager):
            for result, right in zip(results, expected, strict=True):
                assert torch.equal(result.tokens_per_expert_E, right.tokens_per_expert_E)
                assert result.invalid_rows.item() == 0


@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_counts_again_after_a_row_of_nan(tokens):
    logits_TE = torch.randn(tokens, 64, device="cuda")
    spoilt_TE = logits_TE.clone()
    spoilt_TE[0, 5] = torch.nan
    for _ in range(5):
        assert select(spoilt_TE, 2, "native").invalid_rows.item() == 1
        check_select(logits_TE, 2, "native")


def test_a_graph_releases_its_counters():
    """The driver does so on a thread of its own, soon after the graph is gone; until then counts are cleared."""
    logits_TE = torch.randn(500, 64, device="cuda")
    expected = check_select(logits_TE, 2, "native")

    def captured_and_replayed():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = select(logits_TE, 2, "native")
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.tokens_per_expert_E, expected.tokens_per_expert_E)
        return graph

    for _ in range(300):
        captured_and_replayed()
    assert any(count_launches(captured_and_replayed().replay) == 1 for _ in range(200))


def test_with_no_counters_left_a_launch_clears_the_counts():
    logits_TE = torch.randn(500, 64, device="cuda")
    expected = check_select(logits_TE, 2, "native")
    graphs, captured = [], []
    for _ in range(150):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(select(logits_TE, 2, "native"))
    for _ in range(3):
        for graph in graphs:
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(c.tokens_per_expert_E, expected.tokens_per_expert_E) for c in captured)
    assert count_launches(graphs[-1].replay) == 2
