"""The router benchmark on a GPU: graphs, cold caches, launches, and what cannot be captured."""

import json

import pytest
import torch

from moe_lightning.bench import gpu_timers
from moe_lightning.bench.__main__ import main
from moe_lightning.bench.calls import forward_factory
from moe_lightning.ops import native
from moe_lightning.routers import ROUTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.missing("cuda") is not None, reason=f"{native.missing('cuda')}"),
]


@pytest.fixture
def stream():
    with gpu_timers.side_stream(torch.device("cuda", 0)):
        yield


def test_launches_are_counted(stream):
    x = torch.randn(1000, device="cuda")
    assert gpu_timers.count_launches(lambda: x + 1) == 1
    assert gpu_timers.count_launches(lambda: (x + 1).mul_(2).zero_()) == 3
    assert gpu_timers.count_launches(lambda: x[None]) == 0


def test_a_call_that_waits_is_not_captured(stream):
    x = torch.randn(1000, device="cuda")
    assert gpu_timers.can_be_captured(lambda: x * 2)
    assert not gpu_timers.can_be_captured(lambda: x.sum().item())
    assert gpu_timers.can_be_captured(lambda: x * 2)  # the first answer left nothing behind
    assert torch.randn(4, device="cuda").isfinite().all()


def test_a_graph_is_as_long_as_its_calls(stream):
    """Eight copies of a large kernel, divided by eight, take what one takes."""
    x = torch.randn(2**26, device="cuda")
    one, eight = (gpu_timers.replay_us([lambda: torch.neg(x, out=x)] * n, 5, n) for n in (1, 8))
    assert one is not None
    assert eight.median == pytest.approx(one.median, rel=0.2)


@pytest.mark.parametrize("numbers", [2**14, 2**22], ids=["with a flush", "by rotation"])
def test_cold_is_slower_than_warm(stream, numbers):
    x = torch.randn(numbers, device="cuda")
    make = forward_factory(torch.sum, (x,))
    measured = gpu_timers.measure_on_gpu({"sum": make}, {"sum": 4 * numbers}, x.device, 9, _silent())["sum"]
    assert measured["cold_us"].median > measured["graph_us"].median > 0
    assert measured["host_us"].median > 0
    assert measured["launches"] >= 1


def _silent():
    from rich.progress import Progress

    return Progress(disable=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_strategy_and_phase_both_ways(dtype, tmp_path):
    path = tmp_path / "r.json"
    flags = ["--device", "cuda", "--dtype", dtype, "--tokens", "256", "--d_model", "128", "--experts", "8"]
    flags += ["--hidden_dim", "64", "--rounds", "2", "--all_strategies", "--backward", "--json", str(path)]
    assert main(["router", *flags, "--plot", str(tmp_path / "r.png")]) == 0
    cases = json.loads(path.read_text())["results"]["cases"]
    assert [found["router"] for found in cases] == list(ROUTERS)
    for found in cases:
        for direction in ("forward", "backward"):
            for name, row in found[direction]["parts"].items():
                moves_nothing = found["router"] == "masked_matmul" and name == "T_permute"
                assert row["eager_us"] > 0
                assert row["host_us"] > 0
                if name.startswith("T_") and name != "T_experts" and not moves_nothing:
                    assert row["graph_us"] > 0, (found["router"], direction, name)
                    assert row["cold_us"] > 0, (found["router"], direction, name)
                    assert row["launches"] is None or row["launches"] > 0
            assert found[direction]["sum_of_parts"]["column"] == "graph_us"
            if dtype != "fp32" and found["router"] != "masked_matmul":  # CUTLASS experts can be captured too
                assert found[direction]["layer_sum_of_parts"]["column"] == "graph_us"


def test_permutation_sweep(tmp_path):
    path = tmp_path / "p.json"
    flags = ["--device", "cuda", "--d_model", "256", "--perm_sweep", "--seq_len", "32", "--batch_sizes", "1", "8"]
    assert main(["router", *flags, "--rounds", "3", "--json", str(path), "--csv", str(tmp_path / "p.csv")]) == 0
    rows = json.loads(path.read_text())["results"]["perm_sweep"]
    assert len(rows) == 6
    assert all(row["us"] == row["cold_us"] > 0 for row in rows)
