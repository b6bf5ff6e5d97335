"""Exact times: every part of an MoE layer moves the clock by a known amount, and nothing else moves it."""

import lightning as L
import pytest
import torch
from tiny_fit import LAYERS, MS, Batches, Clock, fit, tiny_model

from moe_lightning.callbacks import RouterTiming, clocks
from moe_lightning.callbacks.base import moe_layers
from moe_lightning.layers import dispatch, no_hook
from moe_lightning.layers.experts import Experts
from moe_lightning.routers import FusedSelect
from moe_lightning.routers.base import Router
from moe_lightning.training.language_module import LanguageModule

FORWARD = {"T_logit": 1, "T_select": 2, "T_index": 3, "T_permute": 4, "T_experts": 5, "T_unpack": 6}
BACKWARD = {"T_logit": 10, "T_select": 20, "T_pack": 40, "T_experts": 50, "T_unpack": 60}
OPTIMIZER = 100  # units a micro-batch spends outside the layers


def every_batch(**options):
    """Times every micro-batch but the first, which warms up, and logs every layer at every step."""
    return RouterTiming(**{"every_n_batches": 1, "layers_every_n_steps": 1, **options})


def sums(times):
    """With T_pack and T_route of one direction."""
    pack = times["T_index"] + times["T_permute"] if "T_index" in times else times["T_pack"]
    return {**times, "T_pack": pack, "T_route": times["T_logit"] + times["T_select"] + pack}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(monkeypatch, clocks)

    class Tick(torch.autograd.Function):
        """The identity, which takes time both ways."""

        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.backward_units = backward
            clock.tick(forward)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            clock.tick(ctx.backward_units)
            return gradient, None, None

    def slow(owner, name, phase, ticks, backward=0):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: ticks(real(*args, **kwargs), phase, backward))

    def tensor(y, forward, backward):
        return Tick.apply(y, forward, backward)

    def selection(y, forward, backward):
        return y._replace(weights_TK=Tick.apply(y.weights_TK, forward, backward))

    def index(y, forward, backward):
        clock.tick(forward)
        return y

    slow(Router, "gate", 1, tensor, 10)
    slow(FusedSelect, "select_experts", 2, selection, 20)
    slow(dispatch, "build_index", 3, index)
    slow(dispatch, "permute", 4, tensor, 40)
    slow(Experts, "forward", 5, tensor, 50)
    slow(dispatch, "unpermute", 6, tensor, 60)
    step = LanguageModule.training_step
    monkeypatch.setattr(LanguageModule, "training_step", lambda *args: (clock.tick(OPTIMIZER), step(*args))[1])
    return clock


STEP = OPTIMIZER + LAYERS * (sum(FORWARD.values()) + sum(BACKWARD.values()))


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_every_phase_of_a_training_run(clock, accumulated):
    steps, _, _ = fit([every_batch()], batches=6, accumulate_grad_batches=accumulated)
    logged = [metrics for metrics in steps.values() if "router_time/step_ms" in metrics]
    assert len(logged) == 6 // accumulated - (accumulated == 1)
    directions = {"forward": sums(FORWARD), "backward": sums(BACKWARD)}
    for metrics in logged:
        for direction, times in directions.items():
            for name, units in times.items():
                mean = metrics[f"router_time/{direction}/{name}_ms"]
                assert mean == pytest.approx(LAYERS * units * MS, rel=1e-12), (direction, name)
                for layer in range(LAYERS):
                    tag = f"router_time_layer/L{layer}/{direction}/{name}_ms"
                    assert metrics[tag] == pytest.approx(units * MS, rel=1e-12)
        assert metrics["router_time/step_ms"] == pytest.approx(STEP * MS, rel=1e-12)
        assert metrics["router_time/T_route_share"] == pytest.approx(LAYERS * (10 + 70) / STEP, rel=1e-12)


def test_sums_hold_for_the_tags_of_each_direction(clock):
    """T_pack = T_index + T_permute and T_route = T_logit + T_select + T_pack. Backward has no T_index of its own: what
    it spends there is the gradient of the permutation.
    """
    steps, _, _ = fit([every_batch()], batches=2)
    metrics = steps[max(steps)]
    forward, backward = (
        {tag.split("/")[-1]: value for tag, value in metrics.items() if tag.startswith(f"router_time/{direction}/")}
        for direction in ("forward", "backward")
    )
    assert forward["T_pack_ms"] == forward["T_index_ms"] + forward["T_permute_ms"] == LAYERS * (3 + 4) * MS
    for times, expected in ((forward, 1 + 2 + 3 + 4), (backward, 10 + 20 + 40)):
        assert times["T_route_ms"] == times["T_logit_ms"] + times["T_select_ms"] + times["T_pack_ms"]
        assert times["T_route_ms"] == LAYERS * expected * MS
    assert "T_index_ms" not in backward
    assert not any(tag.startswith("router_time/T_") and tag != "router_time/T_route_share" for tag in metrics)


def test_sanity_check_and_validation_are_apart(clock):
    callback = every_batch()
    steps, _, _ = fit([callback], batches=4, validation=3, num_sanity_val_steps=2, val_check_interval=2)
    training = [metrics for metrics in steps.values() if "router_time/step_ms" in metrics]
    assert len(training) == 3
    for metrics in training:
        assert metrics["router_time/step_ms"] == pytest.approx(STEP * MS, rel=1e-12)
        assert metrics["router_time_layer/L0/forward/T_logit_ms"] == 1 * MS
    validated = [metrics for metrics in steps.values() if "router_time_val/T_route_ms" in metrics]
    assert len(validated) == 2  # the sanity check logged nothing
    for metrics in validated:
        for name, units in sums(FORWARD).items():
            assert metrics[f"router_time_val/{name}_ms"] == pytest.approx(LAYERS * units * MS, rel=1e-12)
    whole = callback.run_times()
    assert whole.step_milliseconds == pytest.approx(STEP * MS, rel=1e-12)
    assert whole.forward["T_logit"] == pytest.approx(LAYERS * 1 * MS, rel=1e-12)
    assert whole.backward["T_logit"] == pytest.approx(LAYERS * 10 * MS, rel=1e-12)
    assert whole.route_share == pytest.approx(LAYERS * (10 + 70) / STEP, rel=1e-12)


def test_interval_is_a_mean_over_its_batches(clock, monkeypatch):
    gate = Router.gate
    slower = iter(range(100))
    monkeypatch.setattr(Router, "gate", lambda *args: (clock.tick(next(slower)), gate(*args))[1])
    steps, _, _ = fit([every_batch()], batches=4, log_every_n_steps=2)
    means = [metrics["router_time_layer/L0/forward/T_logit_ms"] for metrics in steps.values() if metrics]
    # Layer 0 has every second call; the first batch, which had 0, warms up.
    assert means == [(1 + 2) * MS, (1 + (4 + 6) / 2) * MS]


def test_off_leaves_the_layers_untouched(clock):
    marks = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            marks.extend(layer.hook for layer in moe_layers(module))

    callback = RouterTiming(enabled=False)
    steps, _, _ = fit([callback, Look()], batches=2)
    assert marks
    assert all(mark is no_hook for mark in marks)
    assert not any(name.startswith("router_time") for metrics in steps.values() for name in metrics)
    assert callback.run_times() is None


def test_layers_can_be_left_out(clock):
    steps, _, _ = fit([every_batch(layers_every_n_steps=0)], batches=2)
    metrics = steps[max(steps)]
    assert metrics["router_time/forward/T_route_ms"] == LAYERS * 10 * MS
    assert metrics["router_time/backward/T_route_ms"] == LAYERS * 70 * MS
    assert not any(name.startswith("router_time_layer") for name in metrics)


def test_a_batch_in_three_is_timed(clock):
    timed = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            timed.append([layer.hook is not no_hook for layer in moe_layers(module)])

    steps, _, _ = fit([RouterTiming(every_n_batches=3), Look()], batches=9)
    assert timed == [[i % 3 == 0] * LAYERS for i in range(9)]
    logged = [metrics for metrics in steps.values() if "router_time/step_ms" in metrics]
    assert len(logged) == 2  # of the batches 3 and 6; batch 0 warms up
    for metrics in logged:
        assert metrics["router_time/forward/T_route_ms"] == LAYERS * 10 * MS
        assert metrics["router_time/backward/T_route_ms"] == LAYERS * 70 * MS
        assert metrics["router_time/step_ms"] == pytest.approx(STEP * MS, rel=1e-12)


@pytest.mark.parametrize("broken_at", [None, 0, 2])
def test_clocks_are_taken_out(clock, broken_at):
    class Break(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            if trainer.global_step == broken_at:
                raise RuntimeError("power cut")

    model = tiny_model()
    if broken_at is None:
        fit([every_batch(), Break()], model, batches=3)
    else:
        with pytest.raises(RuntimeError, match="power cut"):
            fit([every_batch(), Break()], model, batches=3)
    assert all(layer.hook is no_hook for layer in moe_layers(model))


@pytest.mark.parametrize("options", [{"every_n_batches": 0}, {"every_n_batches": -1}, {"layers_every_n_steps": -1}])
def test_impossible_intervals_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^router_timing: {name} .*got .*{value}$"):
        RouterTiming(**options)


def test_a_dense_model_has_no_times():
    from moe_lightning.training.modules import MLPModule

    callback = every_batch()
    steps, _, _ = fit([callback], MLPModule(64, 16), batches=2)
    assert not any(name.startswith("router_time") for metrics in steps.values() for name in metrics)
    assert callback.run_times() is None


def test_test_and_validate_do_not_pile_up_events(monkeypatch):
    """Passes that are not logged must not be kept either: a test split has thousands of batches."""
    callback = every_batch()
    kept = []

    class Look(L.Callback):
        def on_test_batch_start(self, *args):
            kept.append(len(callback._clock.timer) if callback._clock else 0)

        on_validation_batch_start = on_test_batch_start

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[callback, Look()],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.validate(tiny_model(), Batches(6), verbose=False)
    assert max(kept) <= LAYERS
    trainer.test(tiny_model(), Batches(6), verbose=False)
    assert max(kept) <= LAYERS
