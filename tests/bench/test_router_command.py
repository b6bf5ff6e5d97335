"""`python -m moe_lightning.bench router` from end to end, small and on the CPU."""

import csv
import json
import math

import pytest
import torch

from moe_lightning.bench import plots, roofline, timers
from moe_lightning.bench.__main__ import main
from moe_lightning.bench.commands.trace import STEPS, read_trace
from moe_lightning.bench.router import case
from moe_lightning.bench.router import measure as router_measure
from moe_lightning.bench.router.command import WIDTH
from moe_lightning.bench.spread import Spread
from moe_lightning.callbacks import trace as callback_trace
from moe_lightning.ops import native
from moe_lightning.routers import ROUTERS

SMALL = [
    "--device",
    "cpu",
    "--tokens",
    "64",
    "--d_model",
    "32",
    "--experts",
    "8",
    "--hidden_dim",
    "16",
    "--rounds",
    "1",
]
FORWARD = ["T_logit", "T_select", "T_index", "T_permute", "T_pack", "T_route", "T_experts", "T_unpack", "layer"]
BACKWARD = ["T_logit", "T_select", "T_pack", "T_route", "T_experts", "T_unpack", "layer"]
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """Peaks and caches measured in milliseconds."""
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setattr(timers, "cache_bytes", lambda: 2**16)
    monkeypatch.setattr(timers, "COLD_ROUNDS", 2)


def router(*flags):
    assert main(["router", *SMALL, *flags]) == 0


def results_of(path):
    record = json.loads(path.read_text())
    assert record["name"] == "router"
    return record["results"]


def test_every_strategy_and_phase_both_ways(tmp_path, capsys):
    record, picture = tmp_path / "new" / "r.json", tmp_path / "pictures" / "r.png"
    router("--all_strategies", "--backward", "--json", str(record), "--plot", str(picture))
    results = results_of(record)
    assert results["peaks"]["copy"] > 0
    assert [found["router"] for found in results["cases"]] == list(ROUTERS)
    for found in results["cases"]:
        assert 1 <= found["load"]["max_over_mean"] <= 8 / 2
        assert 0 <= found["load"]["cv"] < 2
        for direction, names in (("forward", FORWARD), ("backward", BACKWARD)):
            parts = found[direction]["parts"]
            assert list(parts) == names
            assert all(parts[name][column] > 0 for name in names for column in ("eager_us", "cold_us", "layer_share"))
            assert math.isclose(
                parts["T_route"]["eager_us"], sum(parts[n]["eager_us"] for n in ("T_logit", "T_select", "T_pack"))
            )
            check = found[direction]["sum_of_parts"]
            assert check["parts_us"] == parts["T_route"]["eager_us"]
            assert math.isclose(check["gap"], check["parts_us"] / check["whole_us"] - 1)
            check = found[direction]["layer_sum_of_parts"]
            assert math.isclose(
                check["parts_us"], sum(parts[n]["eager_us"] for n in ("T_route", "T_experts", "T_unpack"))
            )
            assert check["whole_us"] == parts["layer"]["eager_us"]
            assert {check["verdict"]} <= {"too noisy to tell", "over 10%", "within 10%"}
            check = found[direction]["in_layer"]
            assert check["whole_us"] == parts["layer"]["in_layer_us"]
            assert math.isclose(
                check["parts_us"], sum(parts[n]["in_layer_us"] for n in ("T_route", "T_experts", "T_unpack"))
            )
            assert set(check["outside"]) <= set(parts)
            for row in parts.values():
                for column in ("eager_us", "cold_us", "in_layer_us"):
                    spread = row["spread"][column]
                    assert spread["q1"] <= spread["median"] == row[column] <= spread["q3"]
        forward = found["forward"]["parts"]
        for column in ("eager_us", "roofline_us", "bytes"):
            assert math.isclose(forward["T_pack"][column], forward["T_index"][column] + forward["T_permute"][column])
    assert results["crossovers"][0]["rows"][0]["num_experts"] == 2
    assert picture.read_bytes().startswith(PNG)
    output = capsys.readouterr().out
    assert all(
        text in output
        for text in (*ROUTERS, *FORWARD, "in one go", "layer in one go", "phases in the layer", "max/mean", "±")
    )
    assert max(len(line) for line in output.splitlines()) <= WIDTH


def test_a_sweep_is_the_cross_product_and_draws_lines(tmp_path, capsys, monkeypatch):
    titles, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, *to: (titles.append(figure.get_suptitle()), save(figure, *to)))
    torch.set_num_threads(2)  # of the process; the measurement has its own
    record, picture = tmp_path / "r.json", tmp_path / "r.png"
    router("--tokens", "16", "48", "--top_k", "1", "2", "--json", str(record), "--plot", str(picture))
    cases = results_of(record)["cases"]
    torch.set_num_threads(1)
    assert titles == ["Cost of routing, fp32, CPU, 1 thread"]
    assert [(found["top_k"], found["tokens"]) for found in cases] == [(1, 16), (1, 48), (2, 16), (2, 48)]
    assert capsys.readouterr().out.count("forward: ") == 4
    assert picture.read_bytes().startswith(PNG)


def test_skew_is_seen_in_the_load(tmp_path):
    loads = []
    for flags in ([], ["--skew_experts", "2", "--skew_bias", "5"]):
        router(*flags, "--json", str(tmp_path / "r.json"))
        loads.append(results_of(tmp_path / "r.json")["cases"][0]["load"])
    assert loads[1]["max_over_mean"] > 3 > loads[0]["max_over_mean"]
    assert loads[1]["cv"] > loads[0]["cv"]


def test_traces(tmp_path, capsys):
    folder = tmp_path / "traces"
    router("--strategy", "fused_select", "masked_matmul", "--backward", "--trace", str(folder))
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("fused_select", "masked_matmul"):
        [path] = folder.glob(f"rank0.{name}.*.pt.trace.json.gz")
        assert f"trace: {name}: {path}" in printed
        trace = read_trace(path)
        assert trace.steps == STEPS
        names = [*callback_trace.FORWARD, *(f"{name}/backward" for name in callback_trace.BACKWARD)]
        assert [found.phase for found in trace.ranges] == names * STEPS


def test_experts_that_are_too_large_are_left_out_and_never_allocated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(case, "CPU_BYTES", 1000)
    router("--strategy", "masked_matmul", "fused_select", "--backward", "--json", str(tmp_path / "r.json"))
    masked, fused = results_of(tmp_path / "r.json")["cases"]
    assert list(fused["forward"]["parts"]) == [n for n in FORWARD if n not in ("T_experts", "layer")]
    assert list(fused["backward"]["parts"]) == [n for n in BACKWARD if n not in ("T_experts", "layer")]
    assert list(masked["forward"]["parts"]) == FORWARD[:6]  # its rows are too large to be summed
    assert list(masked["backward"]["parts"]) == ["T_logit", "T_select"]
    output = capsys.readouterr().out
    assert "no layer, the experts' weights take" in output
    assert "no crossover measured" in output


@pytest.fixture
def rounds_of(monkeypatch):
    """What the timers see: the rounds of every call, by the end of its name; 1 us each otherwise."""

    def plant(**rounds):
        def measure(makes, _rounds, _progress):
            found = {}
            for name in makes:
                own = next((us for part, us in rounds.items() if name.endswith(f"/{part}")), [1.0] * 4)
                found[name] = dict.fromkeys(("eager_us", "cold_us"), Spread.of(own))
            return found

        monkeypatch.setattr(timers, "measure_on_cpu", measure)
        monkeypatch.setattr(router_measure, "measure_in_layer", lambda *_: {})
        monkeypatch.setattr(roofline, "seconds_per_call", lambda *_: 1e-3)

    return plant


def lines(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_gap_between_parts_and_whole_is_said_in_both_directions(capsys, rounds_of):
    rounds_of(route=[1e6] * 4, layer=[6.2] * 4)
    router("--backward")
    said = lines(capsys)
    route = "parts {} us ±0%, T_route in one go 1,000,000.0 us ±0%, gap -100.0% (eager)"
    assert f"naive_topk: OVER 10%: {route.format('4.0')}" in said
    assert f"naive_topk: OVER 10%: {route.format('3.0')}" in said
    layer = "parts {} us ±0%, layer in one go 6.2 us ±0%, gap {} (eager)"
    assert f"naive_topk: {layer.format('6.0', '-3.2%')}" in said
    assert f"naive_topk: OVER 10%: {layer.format('5.0', '-19.4%')}" in said
    assert "too noisy to tell" not in said


def test_a_busy_machine_gets_no_verdict(capsys, rounds_of):
    rounds_of(T_permute=[1.0, 24_505.0, 1.0, 40_000.0], route=[946.0] * 4)
    router()
    said = lines(capsys)
    assert (
        "naive_topk: too noisy to tell: parts 12,256.0 us ±116%, T_route in one go 946.0 us ±0% "
        "(quartiles 232% apart) (eager)" in said
    )
    assert "naive_topk: too noisy to tell: parts 12,258.0 us ±116%, layer in one go 1.0 us ±0%" in said
    assert "gap" not in said
    assert "too noisy to tell: 2 of 16 times, the worst naive_topk T_permute eager" in said
    assert "12,253 ±116%" in said


def test_permutation_sweep(tmp_path, capsys):
    table, record, picture = tmp_path / "new" / "p.csv", tmp_path / "p.json", tmp_path / "p.svg"
    sweep = ["--perm_sweep", "--seq_len", "8", "--batch_sizes", "1", "4"]
    router(*sweep, "--csv", str(table), "--json", str(record), "--plot", str(picture))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch_size"], row["tokens"], row["variant"]) for row in rows] == [
        (batch, tokens, variant)
        for batch, tokens in (("1", "8"), ("4", "32"))
        for variant in ("x[perm // K]", "index_select", "permute")
    ]
    copy = results_of(record)["peaks"]["copy"]
    for row in rows:
        tokens, us = int(row["tokens"]), float(row["us"])
        moved = tokens * 32 * 4 * 3 + tokens * 2 * 4  # x once, its rows twice, the order
        assert us > 0
        assert int(row["bytes"]) == moved
        assert float(row["us_q1"]) <= us <= float(row["us_q3"])
        assert math.isclose(float(row["bandwidth_share"]), moved / (us * 1e-6) / copy)
    assert picture.read_text().lstrip().startswith("<?xml")
    assert "x[perm // K] us" in capsys.readouterr().out


BAD = {
    "a misspelt router": (["--strategy", "fused_selct"], "'fused_selct'; did you mean fused_select"),
    "a misspelt device": (["--device", "cdua"], "device must be one of cuda, cpu, got 'cdua'; did you mean cuda"),
    "a misspelt dtype": (["--dtype", "pf16"], "dtype must be one of fp16, bf16, fp32, got 'pf16'; did you mean"),
    "no number": (["--tokens", "many"], "invalid int value: 'many'; see --help"),
    "an unknown flag": (["--stratagem", "sinkhorn"], "unrecognized arguments: --stratagem sinkhorn; see --help"),
    "too few experts": (
        ["--experts", "0"],
        "num_experts must be in [1, 2147483647], got num_experts=0; give --num_experts 64",
    ),
    "one of several": (
        ["--experts", "8", "-4"],
        "num_experts must be in [1, 2147483647], got num_experts=-4; give --num_experts 64",
    ),
    "top_k over experts": (
        ["--top_k", "9"],
        "top_k must be in [1, num_experts], got top_k=9, num_experts=8; lower --top_k or raise --num_experts",
    ),
    "no top_k": (["--top_k", "0"], "top_k must be in [1, num_experts], got top_k=0, num_experts=8; give --top_k 2"),
    "no tokens": (["--tokens", "0"], "tokens must be in [1, 2147483647], got tokens=0; give --tokens 4096"),
    "too many experts for the kernels": (
        ["--strategy", "fused_select", "--experts", "2048"],
        "fused_select takes num_experts <= 1024 and top_k <= 32, got num_experts=2048, top_k=2; lower them or choose",
    ),
    "too large a batch": (["--tokens", "2000000000"], "the phases must fit in memory, got tokens=2000000000"),
    "skew over experts": (
        ["--skew_experts", "9"],
        "skew_experts must be in [0, num_experts], got skew_experts=9, num_experts=8",
    ),
    "a negative skew": (["--skew_experts", "-1"], "skew_experts must be in [0, 2147483647], got skew_experts=-1"),
    "an infinite bias": (["--skew_bias", "inf"], "skew_bias must be finite, got skew_bias=inf"),
    "no iterations": (["--sinkhorn_iters", "0"], "iterations must be a positive integer below 2^31, got iterations=0"),
    "no temperature": (["--sinkhorn_temperature", "0"], "temperature must be positive and finite in fp32"),
    "no rounds": (["--rounds", "0"], "rounds must be a positive integer below 2^31, got rounds=0"),
    "no threads": (["--threads", "0"], "threads must be in [1, 1024], got threads=0"),
    "a picture of no kind": (["--plot", "r.bmp"], "--plot must end in .png, .svg, .pdf, got r.bmp"),
    "a table of nothing": (["--csv", "r.csv"], "--csv holds the rows of --perm_sweep"),
    "a sweep of two widths": (["--perm_sweep", "--d_model", "8", "16"], "--perm_sweep takes one d_model, got [8, 16]"),
    "a sweep backward": (["--perm_sweep", "--backward"], "got --backward; drop it"),
    "a sweep traced": (["--perm_sweep", "--trace"], "--trace is of whole layers, got --perm_sweep too; leave one out"),
    "no batch": (["--perm_sweep", "--batch_sizes", "1", "0"], "batch_sizes must be a positive integer"),
}


@pytest.mark.parametrize(("flags", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(flags, says, capsys):
    assert main(["router", *SMALL, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("bench.router: ")
    assert says in captured.err


@pytest.mark.parametrize("router", ["fused_select", "naive_topk"])
def test_cuda_without_a_gpu(router, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["router", "--strategy", router, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == ("bench.router: device=cuda needs a GPU, torch sees none; use --device cpu\n")


@pytest.mark.parametrize("flags", [["--strategy", "fused_select"], ["--all_strategies"]])
def test_fused_select_does_not_measure_its_stand_in(flags, capsys, monkeypatch):
    monkeypatch.setitem(native._modules, "cpu", None)
    assert main(["router", *SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("bench.router: fused_select needs its cpu kernels: the CPU kernels are not built; ")
    others = " ".join(name for name in ROUTERS if name != "fused_select")
    assert error.endswith(f"or --routers {others}\n")


def test_cuda_kernels_that_are_missing(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(native._modules, "cuda", None)
    assert main(["router", "--strategy", "fused_select", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fused_select needs its cuda kernels: the CUDA kernels are not built; put nvcc on PATH" in error


def test_a_phase_that_takes_another_time_in_the_layer_is_named(capsys, rounds_of, monkeypatch):
    rounds_of()
    times = dict.fromkeys(("T_logit", "T_route", "T_experts", "T_unpack"), Spread.of([1.0] * 4))
    times |= {"T_select": Spread.of([3.0] * 4), "layer": Spread.of([3.1] * 4)}
    monkeypatch.setattr(router_measure, "measure_in_layer", lambda *_: {"naive_topk": {"forward": times}})
    router()
    printed = lines(capsys)
    assert "naive_topk: phases in the layer 3.0 us ±0%, layer without a hook 3.1 us ±0%, gap -3.2%" in printed
    assert "naive_topk: OVER 15%: T_select in the layer 3.00 us, alone 1.00 us, gap 200.0%" in printed
    assert "T_logit in the layer" not in printed
