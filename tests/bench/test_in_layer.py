"""Phases within the layer: what is timed, and the checks of these times, by hand."""

import pytest
import torch
from rich.progress import Progress

from moe_lightning.bench.cli import Settings
from moe_lightning.bench.roofline import Peaks, Shape
from moe_lightning.bench.router.case import build_cases
from moe_lightning.bench.router.in_layer import add_in_layer, gap_to_alone, measure_in_layer
from moe_lightning.bench.spread import Spread
from moe_lightning.layers.phases import FORWARD_ONLY, TIMES, no_hook
from moe_lightning.routers import ROUTERS

SHAPE = Shape(tokens=24, d_model=16, num_experts=4, top_k=2, mlp_hidden_dim=8, size=4)


@pytest.mark.parametrize("backward", [False, True])
def test_every_phase_of_every_layer_is_timed_and_no_hook_stays(backward):
    settings = Settings(torch.device("cpu"), torch.float32, tuple(ROUTERS), backward, 3, 0.5, 0, 0.0, 2)
    cases = build_cases(settings.routers, SHAPE, settings, Peaks(1e12, 1e12))
    with Progress(disable=True) as progress:
        times = measure_in_layer(cases, 2, backward, progress)
    assert set(times) == set(ROUTERS)
    for directions in times.values():
        assert set(directions) == ({"forward", "backward"} if backward else {"forward"})
        assert set(directions["forward"]) == {*TIMES, "layer"}
        for direction, spreads in directions.items():
            assert all(spread.rounds == 2 and spread.median > 0 for spread in spreads.values())
            if direction == "backward":
                assert set(spreads) == {*TIMES, "layer"} - set(FORWARD_ONLY)
    assert all(case.moe.hook is no_hook for case in cases.values())


def test_a_layer_without_experts_is_left_out():
    settings = Settings(torch.device("cpu"), torch.float32, ("fused_select",), False, 3, 0.5, 0, 0.0, 1)
    cases = build_cases(settings.routers, SHAPE, settings, Peaks(1e12, matmul=1.0))  # the experts would take too long
    with Progress(disable=True) as progress:
        assert measure_in_layer(cases, 1, False, progress) == {}


def steady(us):
    return Spread.of(3 * [us])


def row(**times):
    spread = {name: steady(us) for name, us in times.items()}
    return {"eager_us": None, "graph_us": None, "cold_us": None, **times, "spread": spread}


@pytest.mark.parametrize(
    ("in_layer", "gap"),
    [(10.0, 0.0), (15.0, 0.0), (20.0, 0.0), (8.0, 0.25), (30.0, 0.5)],
)
def test_the_gap_is_to_the_nearer_of_the_times_alone(in_layer, gap):
    assert gap_to_alone(row(graph_us=10.0, cold_us=20.0, eager_us=12.0, in_layer_us=in_layer)) == pytest.approx(gap)


def test_noise_and_views_have_no_gap():
    noisy = row(eager_us=10.0, in_layer_us=100.0)
    noisy["spread"]["in_layer_us"] = Spread.of([50.0, 100.0, 200.0, 400.0])
    assert gap_to_alone(noisy) is None
    assert gap_to_alone(row(graph_us=0.0, in_layer_us=5.0)) == 0


def test_the_sum_of_the_phases_and_those_that_do_not_agree():
    names = ("T_logit", "T_route", "T_experts", "T_unpack", "layer")
    result = {"parts": {name: row(eager_us=100.0) for name in names}}
    us = {"T_logit": 50.0, "T_route": 110.0, "T_experts": 90.0, "T_unpack": 120.0, "layer": 400.0}
    add_in_layer(result, {name: steady(value) for name, value in us.items()})
    check = result["in_layer"]
    assert (check["parts_us"], check["whole_us"]) == (320, 400)  # T_logit is in T_route
    assert (check["gap"], check["verdict"]) == (pytest.approx(-0.2), "over 10%")
    assert check["outside"] == {"T_logit": 1.0, "T_unpack": pytest.approx(0.2), "layer": 3.0}
    assert result["parts"]["T_logit"]["in_layer_us"] == 50
    assert result["parts"]["T_logit"]["spread"]["in_layer_us"] == steady(50.0)
