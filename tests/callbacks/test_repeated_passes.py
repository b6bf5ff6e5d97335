"""What callbacks see of passes that backward repeats: nothing twice."""

import pytest
import torch
from tiny_fit import BATCH, EXPERTS, LAYERS, SEQ_LEN, TOP_K, fit, tiny_model
from trace_file import overlaps, read

from moe_lightning.callbacks import ExpertLoadMonitor, RouterGuard, RouterTiming, Throughput, Trace
from moe_lightning.callbacks.trace import BACKWARD, FORWARD

STEPS = 4


def run(recompute, *callbacks):
    return fit(list(callbacks), tiny_model(recompute=recompute), batches=STEPS)[0]


@pytest.mark.parametrize("recompute", ["moe", "block"])
def test_load_tokens_and_times_are_those_of_one_pass(recompute):
    plain, monitor = ExpertLoadMonitor(), ExpertLoadMonitor()
    rate, timing = Throughput(), RouterTiming(every_n_batches=1)
    expected = run("none", plain)
    found = run(recompute, monitor, rate, timing, RouterGuard())
    assert torch.equal(monitor.run_load().counts_LE, plain.run_load().counts_LE)
    assert monitor.run_load().counts_LE.shape == (LAYERS, EXPERTS)
    assert monitor.run_load().counts_LE.sum(1).tolist() == [STEPS * BATCH * SEQ_LEN * TOP_K] * LAYERS
    assert rate._run_tokens == (STEPS - 1) * BATCH * SEQ_LEN  # but for the first step
    once = {(layer, way): STEPS - 1 for layer in range(LAYERS) for way in ("forward", "backward")}
    assert timing._run.totals._passes == once
    for step, metrics in expected.items():
        for name in ("train/loss", "train/balance_loss", "train/z_loss"):
            assert found[step].get(name) == metrics.get(name)


@pytest.mark.parametrize("recompute", ["none", "moe", "block"])
def test_a_trace_has_each_phase_once(recompute, tmp_path):
    run(recompute, Trace(enabled=True, dirpath=str(tmp_path), wait=1, warmup=1, active=2))
    [path] = tmp_path.iterdir()
    slices = read(path)
    ranges = [event["name"] for event in slices if event["name"].startswith("moe/")]
    names = [f"moe/L{layer}/{name}" for layer in range(LAYERS) for name in FORWARD]
    names += [f"moe/L{layer}/{name}/backward" for layer in range(LAYERS) for name in BACKWARD]
    assert sorted(ranges) == sorted(2 * names)
    assert overlaps(slices) == []
