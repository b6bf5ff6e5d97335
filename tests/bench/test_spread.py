"""The spread of a time, when it is too noisy to tell, and what the commands say and record of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from moe_lightning.bench.__main__ import main
from moe_lightning.bench.commands import kernels, quickstart
from moe_lightning.bench.commands.timing import compare
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import Spread, as_row, noise, print_noise, sentence, sum_of_parts, total, with_spread
from moe_lightning.bench.timers import interleave
from moe_lightning.ops.select import GAP_BINS

QUIET = Spread.of([10.0, 11.0, 10.0, 9.5])


def test_quartiles_and_halves_of_the_rounds():
    # Sorted 1 2 4 8 9: the quartiles are the second and the fourth; in time 8 1 | 4 | 2 9.
    assert Spread.of([8.0, 1.0, 4.0, 2.0, 9.0]) == Spread(q1=2, median=4, q3=8, first=4.5, second=5.5, rounds=5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7, 1)


def test_of_a_sum_a_share_and_a_difference():
    one, two = Spread(1, 2, 3, 2, 2, 9), Spread(10, 20, 40, 15, 25, 5)
    assert total([one, two]) == Spread(11, 22, 43, 17, 27, 5)
    assert two.scaled(0.5, offset=-2) == Spread(4, 9, 19, 6.5, 11.5, 5)


@pytest.mark.parametrize(
    ("spread", "doubt"),
    [
        (Spread(90, 100, 110, 100, 100, 9), None),  # a fifth apart
        (Spread(90, 100, 110.1, 100, 100, 9), "quartiles 20% apart"),
        (Spread(80, 100, 120, 100, 100, 9), "quartiles 40% apart"),
        (Spread(100, 100, 100, 95, 105, 9), None),  # a tenth
        (Spread(100, 100, 100, 95, 105.1, 9), "halves of the rounds 10% apart"),
        (Spread(100, 100, 100, 150, 100, 9), "halves of the rounds 50% apart"),
        (Spread(100, 100, 100, 100, 100, 2), "fewer than 3 rounds"),
        (Spread(0, 0, 0, 0, 0, 9), None),  # nothing is launched
    ],
)
def test_too_noisy_to_tell(spread, doubt):
    assert spread.doubt == doubt


def test_one_line_names_how_many_are_too_noisy_and_the_worst():
    assert noise({"a": QUIET, "b": QUIET}) is None
    assert noise({}) is None
    noisy = {"a": QUIET, "b": replace(QUIET, q3=13), "c": replace(QUIET, q3=20)}
    assert noise(noisy) == (
        "too noisy to tell: 2 of 3 times, the worst c, quartiles 101% apart; other work ran on this machine: "
        "measure again"
    )
    assert noise({"a": Spread.of([1.0])}, "--runs") == (
        "too noisy to tell: fewer than 3 rounds have no spread; give more --runs"
    )


def test_names_with_brackets_are_shown_whole(capsys):
    name = "torch: x[perm // K]"
    print_noise(Console(width=200), {name: Spread.of([1.0, 2.0, 9.0])})
    assert name in capsys.readouterr().out
    times = dict.fromkeys(("graph_us", "cold_us", "eager_us", "host_us"), 1.0) | {"launches": 1, "spread": {}}
    row = {
        "case": "permute",
        "size": "4",
        "variant": name,
        "bytes": 8,
        "roofline_us": 1.0,
        "copy_share": 1,
        "faster": 1,
    }
    Console(width=200).print(kernels._table([row | times], ""))
    assert name in capsys.readouterr().out


def test_a_cell_shows_half_the_distance_of_the_quartiles():
    assert with_spread("100", Spread(95, 100, 115, 100, 100, 9)) == "100 ±10%"
    assert with_spread("100", Spread.of([100.0])) == "100"
    assert with_spread("-", None) == "-"


@pytest.mark.parametrize(
    ("parts", "verdict", "said"),
    [
        (109.0, "within 10%", "parts 109.0 us ±0%, whole 100.0 us ±0%, gap +9.0%"),
        (111.0, "over 10%", "OVER 10%: parts 111.0 us ±0%, whole 100.0 us ±0%, gap +11.0%"),
        (76.5, "over 10%", "OVER 10%: parts 76.5 us ±0%, whole 100.0 us ±0%, gap -23.5%"),
    ],
)
def test_parts_against_the_whole(parts, verdict, said):
    check = sum_of_parts(Spread.of([parts] * 3), Spread.of([100.0] * 3))
    assert (check["verdict"], check["gap"]) == (verdict, pytest.approx(parts / 100 - 1))
    assert sentence(check, "parts", "whole") == said


@pytest.mark.parametrize("noisy", ["parts", "whole"])
def test_noise_on_either_side_takes_the_verdict(noisy):
    spreads = {"parts": Spread.of([150.0] * 3), "whole": Spread.of([100.0] * 3)}
    spreads[noisy] = replace(spreads[noisy], first=200)
    check = sum_of_parts(**spreads)
    assert check["verdict"] == "too noisy to tell"
    assert sentence(check, "parts", "whole").startswith("too noisy to tell: parts 150.0 us ±0%, whole 100.0 us ±0% (")
    assert "gap" not in sentence(check, "parts", "whole")


def test_a_record_holds_quartiles_and_is_read_again(tmp_path):
    path = tmp_path / "r.json"
    row = as_row({"eager_us": QUIET, "graph_us": None, "launches": 3})
    assert row == {"eager_us": 10.0, "graph_us": None, "launches": 3, "spread": {"eager_us": QUIET}}
    write_record(path, "ops", row)
    found = json.loads(path.read_text())["results"]
    assert found["spread"]["eager_us"] == {
        "q1": 9.875, "median": 10.0, "q3": 10.25, "first": 10.5, "second": 9.75, "rounds": 4, "noisy": False,
    }  # fmt: skip
    assert Spread.from_record(found["spread"]["eager_us"]) == QUIET


def test_interleaved_rounds_are_kept():
    found = interleave({"a": lambda: None, "b": lambda: None}, rounds=5, round_seconds=1e-6)
    assert {name: spread.rounds for name, spread in found.items()} == {"a": 5, "b": 5}
    assert all(0 < spread.q1 <= spread.median <= spread.q3 for spread in found.values())


def test_cost_of_the_timing_callback_is_of_pairs_of_intervals():
    found = compare(on=[2.2, 3.0, 4.4, 1.1], off=[2.0, 3.0, 4.0, 1.0], interval=10)
    assert found["step_on_s"] == pytest.approx((2.2 + 3.0) / 2 / 10)
    assert found["step_off_s"] == pytest.approx((2.0 + 3.0) / 2 / 10)
    assert found["spread"]["step_off_s"].q3 == pytest.approx(3.25 / 10)
    assert found["cost_percent"] == pytest.approx(10)  # ratios 1.1 1.0 1.1 1.1
    assert (found["cost_percent_low"], found["cost_percent_high"]) == pytest.approx((7.5, 10))
    assert found["intervals"] == 4


def test_the_quickstart_shows_medians_over_its_runs():
    runs = [
        {"step_ms": step, "route_share": 0.1 * step, "seconds": 9 * step, "times_ms": {"T_route": step / 10}, "loss": 3}
        for step in (40.0, 10.0, 20.0)
    ]
    found = quickstart.over_runs(runs)
    assert (found["step_ms"], found["seconds"], found["times_ms"]) == (20, 180, {"T_route": 2.0})
    assert found["route_share"] == pytest.approx(2)
    assert (found["loss"], found["runs"]) == (3, 3)
    assert found["spread"]["step_ms"] == Spread.of([40.0, 10.0, 20.0])
    assert found["spread"]["T_route"].q3 == 3


def test_the_quickstart_trains_each_router_as_often_in_turn(monkeypatch, capsys):
    order = []

    def train(config, router, extra, folder):
        order.append(router)
        times = {"step_ms": 50.0 + len(order), "route_share": 0.1, "seconds": 60.0, "times_ms": {"T_route": 5.0}}
        load = {"max_over_mean_L": [1.5, 1.25], "cv_L": [0.25], "peak_memory_gb": 1.0}
        return {"loss_before": 5.5, "metrics": {"val/loss": 3.25, "val/perplexity": 25.8}, **times, **load}

    monkeypatch.setattr(quickstart, "train", train)
    assert main(["quickstart", "--routers", "naive_topk", "sinkhorn", "--runs", "4"]) == 0
    assert [set(order[i : i + 2]) for i in (0, 2, 4, 6)] == 4 * [{"naive_topk", "sinkhorn"}]
    printed = capsys.readouterr().out
    assert "quickstart, 4 runs per router" in printed
    assert printed.count("60 ±0%") == 2
    assert printed.count(" 0.50 ") == 2  # MaxVio of the worst layer
    assert "too noisy to tell" not in printed
    assert main(["quickstart", "--runs", "0"]) == 2
    assert "bench.quickstart: runs must be a positive integer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["ops", "--rounds", "0"], ["timing", "--intervals", "0"], ["export", "--exports", "0"]]
)
def test_no_rounds_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert f"bench.{arguments[0]}: {arguments[1][2:]} must be a positive integer" in capsys.readouterr().err


def test_bytes_of_every_kernel_by_hand(monkeypatch):
    """Inputs once, outputs once: 6 tokens of 8 in fp32, 4 experts, top-2, so 12 slots."""
    monkeypatch.setattr(kernels, "SELECT_SIZES", ((6, 4, 2),))
    monkeypatch.setattr(kernels, "BIASED_SIZES", ((6, 4, 2, 1, 1),))
    monkeypatch.setattr(kernels, "SINKHORN_SIZES", ((6, 4, 3),))
    monkeypatch.setattr(kernels, "ROUTE", (6, 8, 4, 2))
    found = {case.name: (case.reads, case.writes) for case in kernels._cases(torch.float32, torch.device("cpu"))}
    logits, x, gate, rows = 6 * 4 * 4, 6 * 8 * 4, 4 * 8 * 4, 12 * 8 * 4
    weights = ids = order = 12 * 4
    counts, offsets = 4 * 4, 5 * 4
    bias, gaps = 4 * 4, GAP_BINS * 4 * 4
    assert found == {
        "select": (logits, weights + ids + counts),
        "select backward": (weights + weights + ids, logits),
        "select + index": (logits, weights + ids + counts + 2 * order + offsets),
        "select, sigmoid + bias": (logits + bias, weights + ids + counts),
        "select, sigmoid + bias, gaps counted": (logits + bias + gaps, weights + ids + counts + gaps),
        "sinkhorn": (logits, 6 * 4 * 4),
        "gate": (x + gate, logits),
        "route without rows": (x + gate, logits + weights + ids + counts + 2 * order + offsets),
        "route with rows": (x + gate, logits + weights + ids + counts + 2 * order + offsets + rows),
        "permute": (x + order, rows),
        "permute backward": (rows, x + order),
        "unpermute": (rows + weights + order, x),
        "unpermute backward": (rows + x + weights + order, rows + weights),
    }


def test_the_quickstart_runs_train_py_in_the_repository(monkeypatch):
    commands = []

    def run(command, cwd, **_):
        commands.append((Path(command[1]), cwd))
        return SimpleNamespace(returncode=0, stdout="done")

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart._run(["fit"]) == "done"
    [(script, folder)] = commands
    assert script.is_file()
    assert (folder / "configs/quickstart.yaml").is_file()


def test_a_quickstart_that_never_validates_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "_run", lambda *_: "val/loss 1.0")
    (tmp_path / "sinkhorn/run").mkdir(parents=True)
    summary = {"metrics": {"train/loss": 1.0}, "checkpoint": None, "onnx": None}
    (tmp_path / "sinkhorn/run/summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="a run must validate, got no val/loss"):
        quickstart.train("c.yaml", "sinkhorn", [], tmp_path)
