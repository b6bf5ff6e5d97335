"""Experts over two and three processes (gloo): the layer of one rank, whatever the tokens and chunks."""

import pytest
import torch
import torch.multiprocessing as mp
from all_to_all_processes import EXPERTS, TOP_K, Case, rank_process, tokens_of, whole_layer

from moe_lightning.expert_parallel.all_to_all import NCCL_BLOCKS, AllToAllDispatcher
from moe_lightning.expert_parallel.collectives import AllToAll
from moe_lightning.layers import Experts, experts
from moe_lightning.ops import expert_ffn

DROPPING = {"skew_experts": 3, "skew_bias": 1e3, "capacity_factor": 1.0}
ONE_RANK = {"skew_experts": 3, "skew_bias": 1e3}
ONE_EXPERT = {"skew_experts": 1, "skew_bias": 1e3, "top_k": 1}
CASES = {
    2: [
        *(Case(counts, chunks) for counts in ((33, 20), (0, 17), (5, 0), (1, 1), (0, 0)) for chunks in (1, 4)),
        Case((30, 30), 1, DROPPING),
        Case((30, 30), 3, DROPPING),
        *(Case((33, 20), 3, options) for options in (ONE_RANK, ONE_EXPERT)),
        *(Case((33, 20), options=options, symmetric=True) for options in (ONE_RANK, ONE_EXPERT)),
        Case((33, 20), 3, check_splits=True),
        *(Case(counts, symmetric=True) for counts in ((33, 20), (0, 17), (1, 1), (0, 0))),
        Case((30, 30), options=DROPPING, symmetric=True),
    ],
    3: [
        *(Case((10, 0, 23), chunks) for chunks in (1, 3)),
        Case((8, 8, 8), 2),
        *(Case(counts, symmetric=True) for counts in ((10, 0, 23), (8, 8, 8))),
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder of every world's results; one start of processes each."""
    folders = {}
    for world, cases in CASES.items():
        folders[world] = tmp_path_factory.mktemp(f"world-{world}")
        mp.start_processes(rank_process, (world, str(folders[world]), cases), world, start_method="forkserver")
    return folders


def alone(case):
    """What each rank would get with all experts to itself, and the experts' gradients, which add up over ranks."""
    moe, expected = whole_layer(**case.options), []
    for rank, count in enumerate(case.counts):
        x_TD, grad_TD = tokens_of(rank, count)
        x_TD.requires_grad_()
        moe.router.zero_grad()
        y_TD, _ = moe(x_TD)
        y_TD.backward(grad_TD)
        expected.append({"y": y_TD.detach(), "x": x_TD.grad, "router.weight": moe.router.weight.grad.clone()})
    return expected, {f"experts.{name}": getattr(moe.experts, name).grad for name in ("up", "down")}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "i"), [(w, i) for w, cases in CASES.items() for i in range(len(cases))])
def test_the_layer_of_one_rank(world, i, results):
    case = CASES[world][i]
    expected, experts = alone(case)
    for rank in range(world):
        ours = torch.load(results[world] / f"case-{i}-rank-{rank}.pt")
        share = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
        for name, value in expected[rank].items() | {n: g[share] for n, g in experts.items()}.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
        if case.options and rank == 1:  # every token went to the other one's experts
            assert ours["experts.up"].eq(0).all()


@pytest.mark.slow
def test_counts_and_sizes_that_disagree_are_an_error_on_every_rank(results):
    for rank in range(3):
        agreed, counts, sizes = torch.load(results[3] / f"errors-{rank}.pt")
        assert agreed == ""
        assert counts == "all_to_all: splits disagree: rank 0 sends 2, rank 1 expects 3"
        assert sizes.startswith(
            "dispatch: ranks must agree on (num_experts, top_k, overlap_chunks), got rank 0: (12, 3, 1)"
        )


def test_bad_arguments(group_of_one):
    with pytest.raises(ValueError, match=r"^dispatch: overlap_chunks must be at least 1, got overlap_chunks=0$"):
        AllToAllDispatcher(4, 2, False, group_of_one, chunks=0)
    with pytest.raises(ValueError, match=r"^all_to_all: rows must be as many as .* got rows=2, splits=\[3\]$"):
        AllToAll(group_of_one, [3], [3]).start(torch.randn(2, 4))


def test_an_error_between_start_and_wait_leaves_nothing_behind(group_of_one, monkeypatch):
    """While rows are in flight the kernels leave multiprocessors free: by an argument of each call, and of no other."""
    monkeypatch.setattr(Experts, "implementation_for", lambda *_: "cutlass")  # the op's reference, on the CPU
    margins, fails = [], []

    def watched(*arguments, sm_margin=0, **options):
        margins.append(sm_margin)
        if fails and len(margins) == fails[0]:
            raise RuntimeError("planted")
        return expert_ffn(*arguments, sm_margin=sm_margin, **options)

    monkeypatch.setattr(experts, "expert_ffn", watched)
    alone, spread = whole_layer(), whole_layer()
    spread.dispatcher = AllToAllDispatcher(EXPERTS, TOP_K, False, group_of_one, chunks=3)
    x_TD, _ = tokens_of(0, 33)
    expected_TD = alone(x_TD)[0]
    assert margins == [0]
    margins.clear()
    fails.append(2)
    with pytest.raises(RuntimeError, match="planted"):
        spread(x_TD)
    assert margins == [NCCL_BLOCKS] * 2
    fails.clear()
    margins.clear()
    torch.testing.assert_close(alone(x_TD)[0], expected_TD, rtol=0, atol=0)
    assert margins == [0]
    torch.testing.assert_close(spread(x_TD)[0], expected_TD)
    assert margins == [0, *[NCCL_BLOCKS] * 3]
