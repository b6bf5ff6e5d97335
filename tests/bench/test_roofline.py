"""Bytes, FLOPs and roofline bounds, worked out by hand for one small layer."""

import pytest

from moe_lightning.bench import gpu_timers
from moe_lightning.bench.roofline import Cost, Peaks, Shape, backward_costs, forward_costs
from moe_lightning.bench.router.crossover import answer, crossing_of, doubted
from moe_lightning.bench.router.measure import account
from moe_lightning.bench.spread import Spread
from moe_lightning.bench.timers import Times

# fp16: x 10 x 8 is 160 bytes, rows 20 x 8 are 320, logits 10 x 4 are 80, the gate 4 x 8 is 64, the mask 160,
# the experts' three 4 x 6 x 8 matrices 1152, the masked rows 4 x 10 x 8 are 640.
SHAPE = Shape(tokens=10, d_model=8, num_experts=4, top_k=2, mlp_hidden_dim=6, size=2)


def test_forward_of_a_permuting_layer():
    assert forward_costs(SHAPE, masked=False) == {
        "T_logit": Cost(160 + 64, 80, 2 * 10 * 8 * 4),
        "T_select": Cost(80, 160 + 16),
        "T_index": Cost(80, 160 + 20),
        "T_permute": Cost(160 + 80, 320),
        "T_experts": Cost(320 + 1152 + 20, 320, 2 * 20 * 3 * 6 * 8),
        "T_unpack": Cost(320 + 80 + 80, 160),
    }


def test_forward_of_a_masked_layer():
    costs = forward_costs(SHAPE, masked=True)
    assert costs["T_logit"] == forward_costs(SHAPE, masked=False)["T_logit"]
    assert costs["T_index"] == Cost(80 + 80, 160)
    assert costs["T_permute"] == Cost(0, 0)
    assert costs["T_experts"] == Cost(160 + 1152, 640, 2 * 40 * 3 * 6 * 8)
    assert costs["T_unpack"] == Cost(640 + 160, 160)


def test_backward_of_a_permuting_layer():
    assert backward_costs(SHAPE, masked=False) == {
        "T_logit": Cost(80 + 2 * 160 + 64, 160 + 64, 4 * 10 * 8 * 4),
        "T_select": Cost(80 + 80 + 80, 80),
        "T_pack": Cost(320 + 80, 160),
        "T_experts": Cost(320 + 320 + 1152 + 20, 320 + 1152, 2 * 2 * 20 * 3 * 6 * 8),
        "T_unpack": Cost(160 + 320 + 80 + 80, 320 + 80),
    }


def test_backward_of_a_masked_layer():
    costs = backward_costs(SHAPE, masked=True)
    assert costs["T_pack"] == Cost(640 + 160 + 80, 160 + 80)
    assert costs["T_experts"] == Cost(160 + 640 + 1152, 640 + 1152, 2 * 2 * 40 * 3 * 6 * 8)
    assert costs["T_unpack"] == Cost(160 + 640 + 160, 640 + 160)


def exactly(**times):
    """Times of a machine on which every round takes the same."""
    spreads = {name: Spread.of(3 * [us]) for name, us in times.items() if name.endswith("_us")}
    return Times(**times | spreads)


def test_a_layer_whose_experts_take_the_combine_weights():
    """The weights and the order are read by the experts, and combining reads where each row is: 4 bytes per slot."""
    unfolded, folded = forward_costs(SHAPE, masked=False), forward_costs(SHAPE, masked=False, fused_weights=True)
    assert folded == unfolded | {
        "T_experts": Cost(320 + 1152 + 20 + 80 + 80, 320, 2 * 20 * 3 * 6 * 8),
        "T_unpack": Cost(320 + 80, 160),
    }
    assert backward_costs(SHAPE, masked=False, fused_weights=True) == backward_costs(SHAPE, masked=False) | {
        "T_experts": Cost(320 + 320 + 1152 + 20 + 80 + 80, 320 + 1152 + 80, 2 * 2 * 20 * 3 * 6 * 8),
        "T_unpack": Cost(160 + 80, 320),
    }


def test_the_roofline_is_the_longer_of_memory_and_arithmetic():
    peaks = Peaks(copy=1e9, matmul=1e12)
    assert peaks.roofline_us(Cost(3000, 1000)) == pytest.approx(4)
    assert peaks.roofline_us(Cost(3000, 1000, flops=9_000_000)) == pytest.approx(9)


def test_sums_ratios_shares_and_the_check_of_the_parts():
    names = ("T_logit", "T_select", "T_index", "T_permute", "T_experts", "T_unpack")
    times = {name: exactly(eager_us=10.0 * (i + 1), graph_us=float(i + 1), launches=i) for i, name in enumerate(names)}
    times |= {"route": exactly(eager_us=90.0, graph_us=8.0), "layer": exactly(eager_us=200.0, graph_us=20.0)}
    costs = {name: Cost(1000, 1000) for name in names}
    found = account("forward", times, costs, Peaks(copy=1e9, matmul=1e12))
    parts = found["parts"]
    assert list(parts) == [*names[:4], "T_pack", "T_route", "T_experts", "T_unpack", "layer"]
    assert [parts["T_pack"][c] for c in ("eager_us", "graph_us", "launches", "roofline_us")] == [70, 7, 5, 4]
    assert [parts["T_route"][c] for c in ("eager_us", "graph_us", "launches", "roofline_us")] == [100, 10, 6, 8]
    assert parts["T_route"]["cold_us"] is None
    assert parts["T_route"]["x_sol"] == pytest.approx(10 / 8)  # of the graph, as there is no cold time
    assert parts["T_route"]["layer_share"] == pytest.approx(10 / 20)
    assert parts["layer"]["roofline_us"] == pytest.approx(6 * 2)
    check = found["sum_of_parts"]
    assert (check["column"], check["parts_us"], check["whole_us"]) == ("graph_us", 10, 8)
    assert check["gap"] == pytest.approx(0.25)
    assert check["verdict"] == "over 10%"
    check = found["layer_sum_of_parts"]
    assert (check["column"], check["parts_us"], check["whole_us"]) == ("graph_us", 1 + 2 + 3 + 4 + 5 + 6, 20)
    assert check["gap"] == pytest.approx(0.05)
    assert check["verdict"] == "within 10%"
    assert check["parts"]["eager_us"] == 210


def test_the_parts_of_a_backward_layer_are_held_against_it_too():
    times = {name: exactly(eager_us=100.0) for name in ("T_logit", "T_select", "T_pack", "T_experts", "T_unpack")}
    times |= {"route": exactly(eager_us=300.0), "layer": exactly(eager_us=1000.0)}
    found = account("backward", times, dict.fromkeys(times, Cost(1000, 0)), Peaks(copy=1e9, matmul=1e12))
    check = found["layer_sum_of_parts"]
    assert (check["column"], check["parts_us"], check["whole_us"]) == ("eager_us", 500, 1000)
    assert (check["gap"], check["verdict"]) == (-0.5, "over 10%")


def test_a_sum_is_as_noisy_as_its_parts_and_gets_no_verdict():
    times = {name: exactly(eager_us=10.0) for name in ("T_logit", "T_index", "T_permute")}
    times |= {"T_select": Times(Spread.of([10.0, 20.0, 60.0, 20.0])), "route": exactly(eager_us=50.0)}
    found = account("forward", times, dict.fromkeys(times, Cost(1000, 0)), Peaks(copy=1e9, matmul=1e12))
    spread = found["parts"]["T_route"]["spread"]["eager_us"]
    assert (spread.q1, spread.median, spread.q3) == (30 + 17.5, 30 + 20, 30 + 30)
    assert found["sum_of_parts"]["verdict"] == "too noisy to tell"


def test_a_part_that_no_graph_takes_is_compared_eagerly():
    times = {name: exactly(eager_us=10.0, graph_us=1.0) for name in ("T_logit", "T_index", "T_permute")}
    times |= {"T_select": exactly(eager_us=10.0), "route": exactly(eager_us=50.0)}
    costs = {name: Cost(1000, 0) for name in times if name != "route"}
    found = account("forward", times, costs, Peaks(copy=1e9, matmul=1e12))
    assert found["parts"]["T_route"]["graph_us"] is None
    assert found["sum_of_parts"]["column"] == "eager_us"
    assert found["sum_of_parts"]["gap"] == pytest.approx(-0.2)
    assert found["parts"]["T_route"]["layer_share"] is None


@pytest.mark.parametrize(
    ("ratios", "crossing"),
    [
        ([(2, 0.5), (4, 2.0)], 2**1.5),  # half-way in logarithms
        ([(2, 0.5), (4, 1.0), (8, 2.0)], 4),
        ([(2, 1.5)], None),
        ([(2, 0.5), (4, 0.9)], None),
        ([], None),
    ],
)
def test_crossing(ratios, crossing):
    assert crossing_of(ratios) == (None if crossing is None else pytest.approx(crossing))


def test_the_break_even_in_words():
    assert answer([2, 4], 3.21, None) == "masked_matmul breaks even at E=3.2"
    assert answer([2], None, None) == "masked_matmul breaks even below E=2"
    assert answer([2, 4, 8], None, "too large") == "masked_matmul breaks even beyond E=8 (too large)"
    assert answer([2], None, "too large") == "masked_matmul breaks even beyond E=2 (too large)"
    assert answer([], None, "too large") == "masked_matmul: no crossover measured, too large"
    assert answer([2, 4], 3.21, None, doubted=True) == (
        "masked_matmul: too noisy to tell at how many experts it breaks even"
    )


#: Quartiles, median, and the medians of both halves; the second drifts by 20 %.
STEADY, DRIFTS = Spread(99, 100, 101, 100, 100, 15), Spread(60, 70, 75, 60, 74, 15)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(STEADY, STEADY)], False),
        ([(STEADY, DRIFTS)], False),  # too noisy, but never as slow as the other
        ([(DRIFTS, DRIFTS)], True),
        ([(Spread(70, 74, 80, 74, 74, 15), DRIFTS)], True),
        ([(STEADY, DRIFTS), (STEADY, STEADY)], True),  # a place between the two rows is asked for
        ([(STEADY, DRIFTS), (STEADY, STEADY), (STEADY, STEADY)], False),
    ],
)
def test_noise_doubts_a_crossover_only_where_it_could_move_it(rows, expected):
    made = [{"spread": {"masked_us": masked, "permute_us": permute}} for masked, permute in rows]
    assert doubted(made) == expected


@pytest.mark.parametrize(("reads", "sets"), [(1, gpu_timers.MOST_SETS), (10**6, 125), (50 * 10**6, 3), (10**9, 1)])
def test_cold_inputs_exceed_the_cache(reads, sets):
    assert gpu_timers.cold_sets(reads, l2_bytes=50 * 10**6) == sets
