"""ExpertLoad: literal counts in, literal figures out; ranks are added, never averaged."""

import json

import pytest
import torch
from load_processes import hot_rank

from moe_lightning.metrics import ExpertLoad


def figures(counts, slots):
    metric = ExpertLoad(len(counts), len(counts[0]))
    metric.update(torch.tensor(counts, dtype=torch.int32), torch.tensor(slots))
    return metric.compute()


# counts of a layer, slots offered: max/mean, CV, dead experts, dropped share
LITERAL = {
    "balanced": ([8, 8, 8, 8], 32, 1.0, 0.0, 0, 0.0),
    "all to one": ([32, 0, 0, 0], 32, 4.0, 3**0.5, 3, 0.0),
    "two of four": ([16, 16, 0, 0], 32, 2.0, 1.0, 2, 0.0),
    "a half dropped": ([8, 8, 0, 0], 32, 2.0, 1.0, 2, 0.5),
    "a bit of all": ([1, 2, 3, 4], 16, 1.6, (1.25**0.5) / 2.5, 0, 0.375),
}


@pytest.mark.parametrize("case", LITERAL)
def test_literal_counts(case):
    counts, slots, max_over_mean, cv, dead, dropped = LITERAL[case]
    summary = figures([counts, counts], slots)
    assert summary.max_over_mean_L.tolist() == pytest.approx([max_over_mean] * 2)
    assert summary.cv_L.tolist() == pytest.approx([cv] * 2)
    assert summary.dead_experts_L.tolist() == [dead] * 2
    assert summary.dropped_L.tolist() == pytest.approx([dropped] * 2)
    assert summary.counts_LE.tolist() == [counts] * 2


def test_ranks_hold_neighbouring_experts():
    summary = figures([[4, 4, 8, 0], [16, 0, 0, 0]], 16)
    assert summary.max_over_mean_L.tolist() == [2.0, 4.0]
    of_ranks = summary.of_ranks(2)
    assert of_ranks.counts_LE.tolist() == [[8, 8], [16, 0]]
    assert of_ranks.max_over_mean_L.tolist() == [1.0, 2.0]
    assert of_ranks.cv_L.tolist() == [0.0, 1.0]


def test_one_layer_keeps_its_dimension():
    summary = figures([[3, 1]], 4)
    for figure in (summary.max_over_mean_L, summary.cv_L, summary.dead_experts_L, summary.dropped_L):
        assert figure.shape == (1,)
    assert summary.counts_LE.tolist() == [[3, 1]]


def test_layers_are_apart():
    summary = figures([case[0] for case in LITERAL.values()], 32)
    assert summary.max_over_mean_L.tolist() == pytest.approx([case[2] for case in LITERAL.values()])
    assert summary.dead_experts_L.tolist() == [case[4] for case in LITERAL.values()]


def test_batches_are_added_before_any_ratio():
    metric = ExpertLoad(2, 2)
    for counts in ([[6, 0], [6, 0]], [[0, 6], [6, 0]]):
        metric.update(torch.tensor(counts), torch.tensor(6))
    assert metric.compute().max_over_mean_L.tolist() == [1.0, 2.0]  # layer 0: not the mean of 2 and 2
    assert metric.compute().counts_LE.tolist() == [[6, 6], [12, 0]]


def test_reset_and_the_summary_is_a_copy():
    metric = ExpertLoad(2, 2)
    metric.update(torch.tensor([[4, 2], [3, 3]]), torch.tensor(6))
    before = metric.compute()
    metric.reset()
    metric.update(torch.tensor([[0, 6], [3, 3]]), torch.tensor(6))
    assert before.counts_LE.tolist() == [[4, 2], [3, 3]]
    assert metric.compute().counts_LE.tolist() == [[0, 6], [3, 3]]
    assert metric.compute().dead_experts_L.tolist() == [1, 0]


def test_before_the_first_batch_figures_are_nan(recwarn):
    summary = ExpertLoad(2, 2).compute()
    assert summary.max_over_mean_L.isnan().all()
    assert summary.cv_L.isnan().all()


def test_long_runs_stay_exact():
    metric = ExpertLoad(2, 2)
    for _ in range(3):
        metric.update(torch.tensor([[2**24 + 1, 2**24 - 1]] * 2), torch.tensor(2**25))
    summary = metric.compute()
    assert summary.counts_LE.tolist() == [[3 * 2**24 + 3, 3 * 2**24 - 3]] * 2
    assert summary.dropped_L.tolist() == pytest.approx([0.0] * 2, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_with_other_hot_experts_have_the_skew_of_the_sum(tmp_path):
    torch.multiprocessing.start_processes(hot_rank, (str(tmp_path),), 2, start_method="forkserver")
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert seen["max_over_mean"] == [2.0] * 2  # each rank for itself, and their mean, would be 4.0
        assert seen["cv"] == pytest.approx([1.0] * 2)
        assert seen["dead"] == [2.0] * 2
        assert seen["dropped"] == pytest.approx([0.25] * 2)
        assert seen["counts"] == [[12, 12, 0, 0]] * 2
        assert seen["own_counts_after"] == [[12 if e == rank else 0 for e in range(4)]] * 2
