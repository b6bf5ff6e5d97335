"""Step times and rates hold training steps and nothing else, on a clock that everything in a run moves."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from tiny_fit import BATCH, MS, SEQ_LEN, Batches, Clock, RecordingLogger, fit, tiny_model

from moe_lightning.callbacks import RouterTiming, Throughput, Trace, clocks, trace
from moe_lightning.callbacks.clocks import StepClock
from moe_lightning.training.language_module import LanguageModule

FETCH, MOVE, STEP = 8, 16, 128  # units of 1/1024 s: a batch fetched, brought to the device, trained on
WHOLE = FETCH + MOVE + STEP


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(monkeypatch, clocks)

    def slow(owner, name, units):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (clock.tick(units), real(*args, **kwargs))[1])

    slow(LanguageModule, "training_step", STEP)
    slow(LanguageModule, "validation_step", 3000)
    slow(L.LightningModule, "transfer_batch_to_device", MOVE)
    slow(L.Trainer, "save_checkpoint", 5000)
    slow(trace.StepTrace, "_write", 7000)
    return clock


class SlowBatches(Batches):
    def __init__(self, clock, count, **options):
        super().__init__(count, **options)
        self.clock = clock

    def __iter__(self):
        for batch in self.batches:
            self.clock.tick(FETCH)
            yield batch


class SlowLogger(RecordingLogger):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def log_metrics(self, metrics, step=None):
        self.clock.tick(400)
        super().log_metrics(metrics, step)


def slow_everywhere(base, clock, units):
    """A callback whose hooks outside of a step take time: what draws pictures, generates text or exports does so."""
    hooks = [
        *("setup", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start"),
        *("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"),
        *("on_validation_start", "on_validation_batch_end", "on_validation_end", "on_save_checkpoint"),
    ]

    def tick(self, *args, **kwargs):
        clock.tick(units)

    return type(f"Slow{base.__name__}{units}", (base,), dict.fromkeys(hooks, tick))()


@pytest.mark.parametrize(
    ("first", "options"),
    [
        (True, {}),
        (False, {"accumulate_grad_batches": 2}),
        (False, {"max_epochs": 2}),
        (True, {"log_every_n_steps": 4}),
        (False, {"profiler": "simple"}),
        (True, {"val_check_interval": 3, "num_sanity_val_steps": 1}),
    ],
    ids=lambda value: {True: "clock first", False: "clock last"}.get(value) if isinstance(value, bool) else str(value),
)
def test_checkpoints_exports_images_loggers_and_validation_are_in_no_step(clock, tmp_path, first, options):
    timing, rate = RouterTiming(every_n_batches=1), Throughput(peak_flops=1e6)
    others = [
        slow_everywhere(L.Callback, clock, 900),
        slow_everywhere(Checkpoint, clock, 1100),  # as OnnxExport is one
        ModelCheckpoint(tmp_path / "usual", monitor="val/loss", save_last=True),
        ModelCheckpoint(tmp_path / "own", every_n_train_steps=1, save_top_k=-1),
        Trace(enabled=True, dirpath=str(tmp_path / "trace"), wait=1, warmup=1, active=1),
    ]
    logger = SlowLogger(clock)
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": logger,
            "callbacks": [timing, rate, *others] if first else [*others, timing, rate],
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            **options,
        }
    )
    usual = trainer.profiler
    trainer.fit(tiny_model(), SlowBatches(clock, 8), Batches(2, seed=1))
    logged = {
        tag: [metrics[tag] for metrics in logger.steps.values() if tag in metrics]
        for tag in ("throughput/tokens_per_s", "router_time/step_ms")
    }
    assert logged["throughput/tokens_per_s"] == [BATCH * SEQ_LEN * 1024 / WHOLE] * len(
        logged["throughput/tokens_per_s"]
    )
    assert logged["router_time/step_ms"] == pytest.approx([WHOLE * MS] * len(logged["router_time/step_ms"]), rel=1e-12)
    assert len(logged["throughput/tokens_per_s"]) >= 2
    assert len(logged["router_time/step_ms"]) >= 2
    assert rate.run_tokens_per_second() == BATCH * SEQ_LEN * 1024 / WHOLE
    assert timing.run_times().step_milliseconds == pytest.approx(WHOLE * MS, rel=1e-12)
    assert trainer.profiler is usual
    assert len(list((tmp_path / "own").iterdir())) >= 4
    assert list((tmp_path / "trace").iterdir())


def test_the_profiler_of_the_run_sees_what_it_would_see_without_the_clock(tmp_path):
    seen = []
    for callbacks in ([], [Throughput(peak_flops=1e6)]):
        profiler = SimpleProfiler()
        fit(callbacks, batches=3, profiler=profiler)
        ours = {name for name in profiler.recorded_durations if "Throughput" in name}
        seen.append(
            {name: len(profiler.recorded_durations[name]) for name in profiler.recorded_durations.keys() - ours}
        )
    assert seen[0] == seen[1]
    assert seen[0]["run_training_batch"] == 3


@pytest.mark.parametrize("broken_at", [0, 2])
def test_the_clock_is_taken_out_when_a_run_breaks_off(broken_at):
    class Break(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            self.trainer = trainer
            if trainer.global_step == broken_at:
                assert isinstance(trainer.profiler, StepClock)
                raise RuntimeError("power cut")

    stop = Break()
    with pytest.raises(RuntimeError, match="power cut"):
        fit([Throughput(peak_flops=1e6), RouterTiming(), stop], batches=3)
    assert not isinstance(stop.trainer.profiler, StepClock)


class Gpu:
    """A stream that works on what it was given while the host goes on; waiting for it fails the test."""

    def __init__(self, monkeypatch):
        self.now = self.busy_until = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing=False, external=False):
                assert enable_timing
                assert not external

            def record(self):
                self.at = max(gpu.now, gpu.busy_until)

            def query(self):
                return self.at <= gpu.now

            def elapsed_time(self, later):
                assert later.query(), "read before the stream has passed it"
                return later.at - self.at

            def synchronize(self):
                pytest.fail("waited for the GPU")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("waited for the GPU"))

    def host(self, milliseconds):
        self.now += milliseconds

    def launch(self, milliseconds):
        """A kernel: the host is not held up."""
        self.busy_until = max(self.now, self.busy_until) + milliseconds

    def wait(self):
        """What a checkpoint does, or a metric that is read."""
        self.now = max(self.now, self.busy_until)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def gpu_clock():
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer = SimpleNamespace(training=True, strategy=strategy, profiler=L.pytorch.profilers.PassThroughProfiler())
    return StepClock.attach(trainer)


def step(clock, gpu, *, host=0, kernels=0, fetch=0):
    with clock.profile("[_TrainingEpochLoop].train_dataloader_next"):
        gpu.host(fetch)
    with clock.profile("run_training_batch"):
        gpu.host(host)
        gpu.launch(kernels)


def test_on_a_gpu_a_pause_that_the_queue_hides_takes_nothing_off_a_step(gpu):
    clock = gpu_clock()
    for _ in range(10):
        step(clock, gpu, host=1, kernels=10)
        gpu.host(5)  # a callback: the stream has work for longer
    gpu.wait()
    # The stream begins after the first launch and is never idle from then on.
    assert clock.totals() == (10, 1 + 10 * 10)


def test_on_a_gpu_a_checkpoint_is_in_no_step(gpu):
    clock = gpu_clock()
    for i in range(10):
        step(clock, gpu, host=1, kernels=10)
        if i % 2:
            gpu.wait()  # a checkpoint reads the weights: what is left of the steps is theirs ...
            gpu.host(1000)  # ... and the file is not
            gpu.launch(300)  # nor what validation launches
    gpu.wait()
    # The host's 1 ms shows once: later the stream still works on validation while it passes.
    assert clock.totals() == (10, 1 + 10 * 10)


def test_on_a_gpu_slow_data_and_a_slow_host_are_in_a_step(gpu):
    clock = gpu_clock()
    for _ in range(10):
        step(clock, gpu, fetch=30, host=4, kernels=10)
        gpu.host(3)  # a callback, beside the kernels
    gpu.wait()
    # Of a step the fetch takes 30, of which 7 pass while the stream still works on the step before.
    assert clock.totals() == (10, 34 + 10 + 9 * (23 + 4 + 10))


def test_on_a_gpu_a_step_counts_once_the_stream_has_passed_it(gpu):
    clock = gpu_clock()
    step(clock, gpu, kernels=10)
    step(clock, gpu, kernels=10)
    assert clock.totals() == (0, 0)
    gpu.host(10)
    assert clock.totals() == (1, 10)
    gpu.host(10)
    assert clock.totals() == (2, 20)
