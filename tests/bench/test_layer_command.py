"""bench layer: variants that compute the same, whole records, its picture, one-line errors."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from moe_lightning.bench import roofline
from moe_lightning.bench.__main__ import main
from moe_lightning.bench.commands import layer as layer_command
from moe_lightning.bench.commands.layer import roofline_ms
from moe_lightning.bench.commands.trace import STEPS, read_trace
from moe_lightning.bench.roofline import Peaks, Shape
from moe_lightning.bench.spread import Spread
from moe_lightning.callbacks.trace import BACKWARD, FORWARD

SMALL = ["layer", "--device", "cpu", "--tokens", "64", "--d_model", "32", "--hidden_dim", "48", "--experts", "8"]


@pytest.mark.alone
def test_every_router_and_implementation(tmp_path, capsys):
    path, picture = tmp_path / "layer.json", tmp_path / "layer.png"
    arguments = ["--all_strategies", "--rounds", "3", "--json", str(path), "--plot", str(picture)]
    assert main([*SMALL, *arguments, "--trace", str(tmp_path / "traces")]) == 0
    printed = capsys.readouterr().out
    assert "left out: cutlass, the expert kernels run on a GPU, got device=cpu" in " ".join(printed.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
    case = json.loads(path.read_text())["results"]["cases"][0]
    names = {row["variant"] for row in case["rows"]}
    assert {"naive_topk, loop", "fused_select, grouped_mm", "sinkhorn, loop", "masked_matmul"} <= names
    for row in case["rows"]:
        assert row["distance"] < 1e-4, row
        for direction in ("forward", "forward + backward"):
            spread = row[direction]["spread"]["ms"]
            assert 0 < spread["q1"] <= spread["median"] == row[direction]["ms"] <= spread["q3"]
        assert row["forward"]["x_sol"] > 0
    assert set(case["traces"]) == names | {row["variant"] for row in case["rows"]}
    for name, file in case["traces"].items():
        ours = not name.startswith(("transformers", "Liger"))
        assert len(read_trace(file).ranges) == ours * STEPS * (len(FORWARD) + len(BACKWARD)), name
        assert f"trace: {name}: {file}" in printed
    assert not any(row["compared_with"].startswith("sinkhorn") for row in case["rows"] if "sink" not in row["variant"])


def test_other_circumstances_beside_the_first(tmp_path):
    path = tmp_path / "layer.json"
    also = ["--also_dtype", "bf16", "--also_skew_experts", "2", "--skew_bias", "40"]
    assert main([*SMALL, "--implementation", "loop", "--peers", "--rounds", "1", *also, "--json", str(path)]) == 0
    case = json.loads(path.read_text())["results"]["cases"][0]
    names = [row["variant"] for row in case["rows"]]
    assert names == [f"fused_select, loop{also}" for also in ("", ", in bf16", ", max/mean 4.00")]
    assert case["load"]["max_over_mean"] < 2


def test_rates_and_ratios_by_hand(monkeypatch, tmp_path, capsys):
    """Forward 200 us, forward + backward 1 ms, of 64 tokens, d_model 32, 8 experts of 48, top-2, in fp32."""
    us = iter([[190.0, 200.0, 200.0, 210.0], [1000.0, 1000.0, 400.0, 1900.0]])

    def interleave(calls, *_, **__):
        return dict.fromkeys(calls, Spread.of(next(us)))

    monkeypatch.setattr(layer_command, "interleave", interleave)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 64)
    path = tmp_path / "layer.json"
    assert main([*SMALL, "--implementation", "loop", "--peers", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    [row] = results["cases"][0]["rows"]
    forward, both = row["forward"], row["forward + backward"]
    flops = 2 * 64 * 2 * 3 * 48 * 32 + 2 * 64 * 32 * 8  # experts, gate
    assert (forward["ms"], both["ms"]) == pytest.approx((0.2, 1.0))
    assert (forward["tflops"], both["tflops"]) == pytest.approx((1e-12 * flops / 200e-6, 1e-12 * 3 * flops / 1e-3))
    copy, matmul = results["peaks"]["copy"], results["peaks"]["matmul"]
    moved = 4 * (2 * 64 * 32 + 3 * 8 * 48 * 32 + 8 * 32)
    assert forward["x_sol"] == pytest.approx(200e-6 / max(moved / copy, flops / matmul))
    assert forward["spread"]["ms"]["q3"] == pytest.approx(0.2025)
    printed = capsys.readouterr().out
    assert "0.20 ±1%" in printed
    assert "too noisy to tell: 1 of 2 times, the worst fused_select, loop, forward + backward, quartiles 38% apart" in (
        printed
    )


def test_baselines_compute_the_same_layer(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "layer.json"
    assert main([*SMALL, "--implementation", "loop", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]["cases"][0]["rows"]
    peer = next(row for row in rows if row["variant"].startswith("transformers"))
    assert peer["distance"] < 1e-4
    assert peer["compared_with"] == "fused_select, loop"


class FakeSonic:
    """SonicMoE as its documentation has it: weights (2 F, D, E) and (D, F, E), softmax over the chosen logits."""

    def __init__(self, monkeypatch):
        tiles = [
            SimpleNamespace(tile_m=m, tile_n=n, pingpong=p, cluster_m=c, cluster_n=3 - c, swap_ab=False)
            for m in (128, 256)
            for n in (128, 192, 208)
            for p in (False, True)
            for c in (1, 2)
        ]
        self.tuner = SimpleNamespace(configs=[SimpleNamespace(kwargs={"config": tile}) for tile in tiles])
        quack = SimpleNamespace(gemm_interface=SimpleNamespace(gemm_tuned=self.tuner, partial=len))
        monkeypatch.setitem(sys.modules, "quack", quack)
        enums = SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu"))
        monkeypatch.setitem(sys.modules, "sonicmoe", SimpleNamespace(moe_TC_softmax_topk_layer=self.layer, enums=enums))
        monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)

    def layer(self, x, gate, up, up_bias, down, down_bias, top_k, stream, activation, **options):
        assert (up_bias, down_bias, activation, stream) == (None, None, "swiglu", 0)
        assert options.pop("concat_layout")
        assert options.pop("is_softmax_over_topk")
        assert not any(options.values())
        logits = x @ gate.T
        top, ids = logits.topk(top_k, 1)
        y = torch.zeros_like(x)
        for column, weight in zip(ids.T, top.softmax(1).T, strict=True):
            hidden, gated = torch.einsum("td,gdt->tg", x, up[:, :, column]).chunk(2, 1)
            rows = torch.nn.functional.silu(hidden) * gated
            y = y + weight[:, None] * torch.einsum("tf,dft->td", rows, down[:, :, column])
        return y, logits, None


def test_sonic_computes_the_same_layer_with_few_tiles_to_choose_from(tmp_path, monkeypatch):
    fake, path = FakeSonic(monkeypatch), tmp_path / "layer.json"
    flags = ["--implementation", "loop", "--peers", "sonic", "--rounds", "1"]
    assert main([*SMALL, *flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]["cases"][0]["rows"]
    assert [row["variant"] for row in rows] == ["fused_select, loop", "SonicMoE"]
    assert rows[1]["distance"] < 1e-5
    left = {(c.kwargs["config"].tile_m, c.kwargs["config"].tile_n) for c in fake.tuner.configs}
    assert (len(fake.tuner.configs), left) == (4, {(128, 128), (128, 192), (256, 128), (256, 192)})


def test_a_line_says_what_a_missing_baseline_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "quack", None)
    path = tmp_path / "layer.json"
    flags = ["--implementation", "loop", "--peers", "sonic", "--rounds", "1"]
    assert main([*SMALL, *flags, "--json", str(path)]) == 0
    reason = json.loads(path.read_text())["results"]["cases"][0]["left_out"]["SonicMoE"]
    assert "pip install --no-deps sonic-moe==" in reason
    assert "left out: SonicMoE, not installed" in " ".join(capsys.readouterr().out.split())


def test_roofline_by_hand():
    shape = Shape(tokens=4, d_model=8, num_experts=2, top_k=1, mlp_hidden_dim=16, size=2)
    weights, x, gate = 2 * 3 * 2 * 16 * 8, 2 * 4 * 8, 2 * 2 * 8
    slow_memory = roofline_ms(shape, Peaks(copy=1e3, matmul=1e30))
    assert slow_memory["forward"] == pytest.approx(2 * x + weights + gate)
    assert slow_memory["forward + backward"] == pytest.approx(5 * x + 3 * (weights + gate))
    slow_products = roofline_ms(shape, Peaks(copy=1e30, matmul=1e3))
    assert slow_products["forward"] == pytest.approx(2 * 4 * (3 * 16 * 8 + 2 * 8))
    assert slow_products["forward + backward"] == pytest.approx(3 * slow_products["forward"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--implementation", "cutlas"], "implementation must be one of .* got 'cutlas'; did you mean cutlass"),
        (["--implementation", "cutlass"], "--implementation cutlass is not possible: .* got device=cpu"),
        (["--strategy", "naive"], "router must be one of"),
        (["--top_k", "9"], "top_k must be in"),
        (["--also_dtype", "fp8"], "extra_dtype must be one of"),
        (["--also_skew_experts", "9"], r"extra_skew_experts must be in \[0, 8\]"),
        (["--plot", "x.txt"], "--plot must end in"),
    ],
)
def test_bad_input_is_one_line(flags, said, capsys):
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(said, error), error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_a_gpu(dtype, tmp_path):
    path = tmp_path / "layer.json"
    sizes = ["--tokens", "512", "--d_model", "256", "--hidden_dim", "128", "--experts", "8", "--peers"]
    assert main(["layer", *sizes, "--dtype", dtype, "--rounds", "1", "--json", str(path)]) == 0
    for row in json.loads(path.read_text())["results"]["cases"][0]["rows"]:
        assert row["distance"] < 0.02, row
        assert 0 < row["saved_mb"] < row["peak_mb"]
