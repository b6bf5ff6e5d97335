"""bench ep and bench link on two processes (gloo): whole records and pictures, errors in one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_lightning.bench.__main__ import main
from moe_lightning.bench.commands.trace import STEPS, read_trace
from moe_lightning.bench.ep import movement
from moe_lightning.bench.ep.command import EP_ROUTERS
from moe_lightning.bench.ep.link import transferred
from moe_lightning.bench.ep.measure import derived, parts_check
from moe_lightning.bench.ep.movement import exchanges
from moe_lightning.bench.ep.ranks import slowest
from moe_lightning.bench.spread import Spread
from moe_lightning.callbacks.trace import BACKWARD, FORWARD
from moe_lightning.expert_parallel.all_to_all import Splits
from moe_lightning.report.__main__ import main as report

SMALL = ["--tokens", "32", "--d_model", "16", "--ffn", "24", "--experts", "8", "--rounds", "1", "--device", "cpu"]


def two_ranks(*arguments, seconds=100):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", "moe_lightning.bench", *arguments], capture_output=True, text=True, timeout=seconds
    )


@pytest.mark.slow
def test_ep(tmp_path):
    path, picture = tmp_path / "ep.json", tmp_path / "ep.png"
    sweep = [
        "--all_strategies",
        "--dispatch",
        "symmetric",
        "--overlap_chunks",
        "1",
        "2",
        "--backward",
        "--skew_sweep",
        "0",
        "9",
        "--json",
        str(path),
        "--plot",
        str(picture),
        "--trace",
        str(tmp_path / "traces"),
    ]
    done = two_ranks("ep", *SMALL, *sweep)
    assert done.returncode == 0, done.stderr[-2000:]
    # Rank zero alone prints: a table per number of chunks, each row and its check; dispatch of one chunk both ways.
    assert done.stdout.count("naive_topk") == 2 * 2 + 3 + 1  # and the title of the sweep
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(path.read_text())
    assert record["command"].startswith("torchrun --nproc_per_node 2 -m moe_lightning.bench ep --")
    results = record["results"]
    assert results["link"]["gb_per_s"] > 0
    even, uneven = results["skewed"]
    assert even["expert_max_over_mean"] < uneven["expert_max_over_mean"] == 4  # all slots of 2 on one expert of 8
    assert {even["router"], uneven["router"]} == {"naive_topk"}
    rows = results["cases"]
    assert {(row["chunks"], row["router"]) for row in rows} == {
        (chunks, name) for chunks in (1, 2) for name in EP_ROUTERS
    }
    for row in rows:
        assert all(row[name] > 0 for name in ("T_logit", "T_select", "T_pack", "T_comm", "T_comp", "T_seq"))
        for name, value in derived(row, row["chunks"]).items():
            assert row[name] == (None if value is None else pytest.approx(value))
        assert (row["eta_overlap"] is None) == (row["chunks"] == 1)
        assert row["T_select_naive"] > 0
        assert set(row["spread"]) >= {"T_select", "T_select_naive", "T_counts", "T_comm", "T_comp", "T_seq"}
        assert row["sum_of_parts"]["parts_us"] == pytest.approx(row["T_counts"] + row["T_comm"] + row["T_comp"])
        assert 0 < row["rows_sent"] < 64
        assert row["beyond_all_to_all"] == pytest.approx(row["T_dispatch"] - row["T_all_to_all"])
        assert ("symmetric" in row) == (row["chunks"] == 1)
        if "symmetric" in row:
            layer = row["symmetric"]["T_layer"]
            gained = (row["T_seq"] - layer) / min(row["T_comm"], row["T_comp"])
            assert row["symmetric"]["eta_overlap"] == pytest.approx(gained)
        for times in (row, row.get("symmetric", {"T_dispatch": 1, "T_combine": 1})):
            assert times["T_dispatch"] > 0
            assert times["T_combine"] > 0
        assert row["expert_max_over_mean"] >= row["rank_max_over_mean"] >= 1
        assert 0 <= row["eta_trace"] < 1
        assert row["eta_trace_blocking"] == 0  # the control
    assert rows[0]["router"] == "naive_topk"
    assert rows[0]["delta_select"] == 0
    for router in ("naive_topk", "fused_select", "sinkhorn"):
        for layer, times in (("1-chunks", 0), ("2-chunks", 1), ("blocking", 2), ("symmetric", 1)):
            for rank in (0, 1):
                paths = list((tmp_path / "traces").glob(f"rank{rank}.{router}.{layer}.*.pt.trace.json.gz"))
                assert len(paths) == times
                for path in paths:
                    assert len(read_trace(path).ranges) == STEPS * (len(FORWARD) + len(BACKWARD))


def test_measures_of_overlap_by_hand():
    times = {"T_logit": 1, "T_select": 2, "T_pack": 3, "T_comm": 40, "T_comp": 60, "T_seq": 110, "T_overlapped": 80}
    times |= {"T_dispatch": 30, "T_all_to_all": 20, "T_select_naive": 7}
    assert derived(times, 4) == {
        "eta_overlap": 30 / 40,
        "eta_bound": 0.75,
        "eta_ect": 30 / 50,
        "speedup_overlap": 110 / 80,
        "delta_select": -5,
        "comm_share": 40 / 110,
        "beyond_all_to_all": 10,
    }
    slower = derived(times | {"T_overlapped": 120}, 2)  # than waiting for the exchanges: not clamped
    assert (slower["eta_overlap"], slower["speedup_overlap"]) == (-10 / 40, 110 / 120)
    assert derived(times | {"T_overlapped": 110}, 2)["speedup_overlap"] == 1  # nothing is hidden


def test_one_chunk_measures_no_overlap():
    times = dict.fromkeys(("T_select", "T_select_naive", "T_comm", "T_comp", "T_seq", "T_overlapped"), 10.0)
    found = derived(times | {"T_dispatch": 3.0, "T_all_to_all": 2.0}, 1)
    overlap = ("eta_overlap", "eta_ect", "eta_bound", "speedup_overlap")
    assert [found[name] for name in overlap] == [None] * 4
    assert (found["delta_select"], found["comm_share"], found["beyond_all_to_all"]) == (0, 1, 1)


def test_a_record_whose_one_chunk_has_no_eta_is_drawn(tmp_path):
    record = json.loads((Path(__file__).parents[2] / "docs/benchmarks/ep_nvlink_h200.json").read_text())
    for case in record["results"]["cases"]:
        if case["chunks"] == 1:
            case |= dict.fromkeys(("eta_overlap", "eta_ect", "eta_bound", "speedup_overlap"))
    (tmp_path / "ep.json").write_text(json.dumps(record))
    report(["--bench", str(tmp_path / "ep.json"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "eta_overlap" in page
    assert "None" not in page


def test_the_parts_of_a_layer_across_ranks_hold_its_route_once():
    us = {"T_logit": 5, "T_select": 6, "T_pack": 7, "T_counts": 8.0, "T_comm": 40.0, "T_comp": 60.0, "T_seq": 120.0}
    check = parts_check({name: Spread.of([time] * 3) for name, time in us.items()})
    assert (check["parts_us"], check["whole_us"], check["gap"]) == (108, 120, pytest.approx(-0.1))


@pytest.mark.parametrize(("times", "moved"), [(1, ["there", "back"]), (2, ["there", "back"] * 2)])
def test_t_comm_is_there_and_back_and_twice_that_with_backward(times, moved, monkeypatch):
    seen = []

    class Way:
        def __init__(self, name):
            self.name = name

        def transpose(self):
            return Way("back")

        def start(self, rows):
            seen.append((self.name, rows.shape[0]))

        def wait(self):
            return torch.zeros(2 if self.name == "there" else 3, 4)

    monkeypatch.setattr(movement, "AllToAll", lambda *_: Way("there"))
    splits = Splits([[0, 3]], [[0, 2]], [1])
    exchanges(SimpleNamespace(group=None), splits, torch.ones(6, 4), times)()
    assert seen == [(way, {"there": 3, "back": 2}[way]) for way in moved]


def test_rates_count_the_bytes_that_one_rank_sends():
    spread = Spread.of([100.0] * 3)
    assert transferred(2_000_000, spread) == {"bytes": 2_000_000, "us": 100, "gb_per_s": 20, "spread": {"us": spread}}


def test_times_are_of_the_rank_with_the_longest_median():
    assert slowest([[1.0, 9.0, 1.0], [2.0, 2.0, 3.0], [1.0, 1.0, 1.0]]) == Spread.of([2.0, 2.0, 3.0])


@pytest.mark.slow
def test_link(tmp_path):
    path, picture = tmp_path / "link.json", tmp_path / "link.png"
    files = ["--json", str(path), "--plot", str(picture)]
    done = two_ranks("link", "--device", "cpu", "--kilobytes", "1", "64", "--rounds", "1", *files)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(path.read_text())["results"]["rows"]
    assert {(row["bytes"], row["way"]) for row in rows} == {
        (1024 * k, way) for k in (1, 64) for way in ("0 to 1", "1 to 0", "both", "all_to_all")
    }
    assert all(row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3) for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ep", *SMALL], "bench.ep: needs several processes, got one; run torchrun --nproc_per_node 2"),
        (["link", "--device", "cpu"], "bench.link: needs several processes, got one; run torchrun"),
        (["ep", *SMALL, "--strategy", "masked_matmul"], "masked_matmul lets every expert see every token"),
        (["ep", *SMALL, "--strategy", "fused"], "router must be one of"),
        (["ep", *SMALL, "--dispatch", "nccl"], "--dispatch nccl needs --device cuda, got cpu; use --dispatch gloo"),
        (["ep", *SMALL, "--overlap_chunks", "two"], "overlap_chunks must be integers or auto, got 'two'"),
        (["ep", *SMALL, "--skew_sweep", "0", "nan"], "skew_sweep must be finite, got nan"),
        (["ep", *SMALL, "--overlap_chunks", "0"], "overlap_chunks must be in [1, "),
        (["ep", *SMALL, "--top_k", "9"], "top_k must be in [1, num_experts], got top_k=9, num_experts=8"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert said in error
