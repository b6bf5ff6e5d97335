"""Exact tokens per second and MFU on a clock that only training moves by a known amount."""

import lightning as L
import pytest
from tiny_fit import BATCH, SEQ_LEN, Clock, fit, tiny_model

from moe_lightning.callbacks import Throughput, clocks, throughput
from moe_lightning.training.language_module import LanguageModule


@pytest.fixture
def clock(monkeypatch):
    """A training batch takes 1/8 s, a validation batch 3 s."""
    clock = Clock(monkeypatch, clocks)
    for name, units in (("training_step", 128), ("validation_step", 3072)):
        step = getattr(LanguageModule, name)
        monkeypatch.setattr(
            LanguageModule, name, lambda *args, step=step, units=units: (clock.tick(units), step(*args))[1]
        )
    return clock


TOKENS_PER_S = BATCH * SEQ_LEN * 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"validation": 2, "val_check_interval": 3, "num_sanity_val_steps": 2},
        {"log_every_n_steps": 3},
    ],
    ids=str,
)
def test_tokens_and_mfu_are_exact(clock, options):
    model = tiny_model()
    callback = Throughput(peak_flops=1e6)
    steps, _, _ = fit([callback], model, batches=6, **options)
    rates = [metrics["throughput/tokens_per_s"] for metrics in steps.values() if "throughput/mfu" in metrics]
    mfus = [metrics["throughput/mfu"] for metrics in steps.values() if "throughput/mfu" in metrics]
    assert len(rates) == 6 // options.get("accumulate_grad_batches", options.get("log_every_n_steps", 1))
    assert rates == [TOKENS_PER_S] * len(rates)
    assert mfus == pytest.approx([TOKENS_PER_S * 3 * flops_of_a_token() / 1e6] * len(rates), rel=1e-12)
    assert callback.run_tokens_per_second() == TOKENS_PER_S


def test_tokens_are_those_of_all_ranks_and_the_mean_of_the_run_is_of_one(clock, monkeypatch):
    monkeypatch.setattr(L.Trainer, "world_size", 3)
    callback = Throughput(peak_flops=1e6)
    steps, _, _ = fit([callback], batches=2)
    metrics = steps[max(steps)]
    assert metrics["throughput/tokens_per_s"] == 3 * TOKENS_PER_S
    assert metrics["throughput/mfu"] == pytest.approx(TOKENS_PER_S * 3 * flops_of_a_token() / 1e6)  # of a device
    assert callback.run_tokens_per_second() == TOKENS_PER_S


def flops_of_a_token(d=16, f=16, vocabulary=64, layers=2, top_k=2, experts=4):
    """Two a weight met: attention (4 d^2), gate, K SwiGLU experts (3 d f), norms, head; then causal attention."""
    layer = 4 * d * d + experts * d + top_k * 3 * d * f + 2 * d
    return 2 * (layers * layer + d + vocabulary * d) + layers * 4 * d * SEQ_LEN / 2


def test_a_slow_start_counts_only_where_there_is_nothing_else(clock, monkeypatch):
    step, slow = LanguageModule.training_step, iter([9 * 1024])
    monkeypatch.setattr(LanguageModule, "training_step", lambda *args: (clock.tick(next(slow, 0)), step(*args))[1])
    callback = Throughput(peak_flops=1e6)
    fit([callback], batches=3)
    assert callback.run_tokens_per_second() == TOKENS_PER_S
    slow = iter([9 * 1024])
    callback = Throughput(peak_flops=1e6)
    fit([callback], batches=1)
    assert callback.run_tokens_per_second() == BATCH * SEQ_LEN / (9 + 1 / 8)


def test_off_logs_nothing(clock):
    callback = Throughput(enabled=False)
    steps, _, _ = fit([callback], batches=2)
    assert not any(name.startswith("throughput") for metrics in steps.values() for name in metrics)
    assert callback.run_tokens_per_second() is None


def test_peak_is_measured_where_it_is_unknown(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 2e6)
    callback = Throughput()
    fit([callback], batches=1)
    assert callback.peak == 2e6


@pytest.mark.parametrize("peak", [0, -1.0, float("nan")])
def test_impossible_peak_is_refused(peak):
    with pytest.raises(ValueError, match=r"^throughput: peak_flops must be positive, got peak_flops="):
        Throughput(peak_flops=peak)
