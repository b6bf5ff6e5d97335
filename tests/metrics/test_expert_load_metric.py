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
    summary = figures([counts], slots)
    assert summary.max_over_mean_L.tolist() == pytest.approx([max_over_mean])
    assert summary.cv_L.tolist() == pytest.approx([cv])
    assert summary.dead_experts_L.tolist() == [dead]
    assert summary.dropped_L.tolist() == pytest.approx([dropped])
    assert summary.counts_LE.tolist() == [counts]


def test_layers_are_apart():
    summary = figures([case[0] for case in LITERAL.values()], 32)
    assert summary.max_over_mean_L.tolist() == pytest.approx([case[2] for case in LITERAL.values()])
    assert summary.dead_experts_L.tolist() == [case[4] for case in LITERAL.values()]


def test_batches_are_added_before_any_ratio():
    metric = ExpertLoad(1, 2)
    for counts in ([[6, 0]], [[0, 6]]):
        metric.update(torch.tensor(counts), torch.tensor(6))
    assert metric.compute().max_over_mean_L.tolist() == [1.0]  # not the mean of 2 and 2
    assert metric.compute().counts_LE.tolist() == [[6, 6]]


def test_reset_and_the_summary_is_a_copy():
    metric = ExpertLoad(1, 2)
    metric.update(torch.tensor([[4, 2]]), torch.tensor(6))
    before = metric.compute()
    metric.reset()
    metric.update(torch.tensor([[0, 6]]), torch.tensor(6))
    assert before.counts_LE.tolist() == [[4, 2]]
    assert metric.compute().counts_LE.tolist() == [[0, 6]]
    assert metric.compute().dead_experts_L.tolist() == [1]


def test_before_the_first_batch_figures_are_nan(recwarn):
    summary = ExpertLoad(1, 2).compute()
    assert summary.max_over_mean_L.isnan().all()
    assert summary.cv_L.isnan().all()


def test_counts_beyond_fp32_are_exact():
    metric = ExpertLoad(1, 2)
    for _ in range(3):
        metric.update(torch.tensor([[2**24 + 1, 2**24 - 1]]), torch.tensor(2**25))
    summary = metric.compute()
    assert summary.counts_LE.tolist() == [[3 * 2**24 + 3, 3 * 2**24 - 3]]
    assert summary.dropped_L.tolist() == [0.0]


def test_nothing_dropped_is_exactly_zero_in_a_long_run():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(10**8, 10**9, (64, 64), generator=generator)
    metric = ExpertLoad(64, 64)
    for layer in range(64):
        counts[layer, 0] += counts.sum(1).max() - counts[layer].sum()
    metric.update(counts, counts[0].sum())
    assert metric.compute().dropped_L.tolist() == [0.0] * 64


@pytest.mark.slow
def test_two_ranks_with_other_hot_experts_have_the_skew_of_the_sum(tmp_path):
    torch.multiprocessing.spawn(hot_rank, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert seen["max_over_mean"] == [2.0]  # each rank for itself, and their mean, would be 4.0
        assert seen["cv"] == pytest.approx([1.0])
        assert seen["dead"] == [2.0]
        assert seen["dropped"] == pytest.approx([0.25])
        assert seen["counts"] == [[12, 12, 0, 0]]
        assert seen["own_counts_after"] == [[12 if e == rank else 0 for e in range(4)]]
