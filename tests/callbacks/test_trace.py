"""The Trace callback: every phase of every layer in every traced step, nested in it; nothing left behind."""

from collections import Counter
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.profilers import PyTorchProfiler
from tiny_fit import LAYERS, fit, tiny_model
from trace_file import end, overlaps, read

from moe_lightning.bench.commands import trace as bench_trace
from moe_lightning.callbacks import RouterTiming, Trace
from moe_lightning.callbacks.base import moe_layers
from moe_lightning.callbacks.trace import BACKWARD, FORWARD
from moe_lightning.layers import no_hook
from moe_lightning.training.modules import MLPModule

ACTIVE = 2


def trace(folder, **options):
    return Trace(**{"enabled": True, "dirpath": str(folder), "wait": 1, "warmup": 1, "active": ACTIVE, **options})


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run of ten steps beside RouterTiming: its slices, and what the layers and the timing came to."""
    folder = tmp_path_factory.mktemp("traced")
    timing = RouterTiming(every_n_batches=1)
    model = tiny_model()
    fit([trace(folder), timing], model, batches=10, validation=1, val_check_interval=3)
    [path] = folder.iterdir()
    assert path.name.startswith("rank0.")
    assert path.name.endswith(".pt.trace.json.gz")
    return read(path), model, timing


def ranges_of(slices):
    return [event for event in slices if event["name"].startswith("moe/")]


def test_every_phase_of_every_layer_in_every_step(traced):
    slices, _, _ = traced
    steps = [event for event in slices if event["name"].startswith("ProfilerStep#")]
    assert [event["name"] for event in steps] == ["ProfilerStep#2", "ProfilerStep#3"]
    ranges = ranges_of(slices)
    assert len(ranges) == LAYERS * ACTIVE * (len(FORWARD) + len(BACKWARD))
    names = [f"moe/L{layer}/{name}" for layer in range(LAYERS) for name in FORWARD]
    names += [f"moe/L{layer}/{name}/backward" for layer in reversed(range(LAYERS)) for name in BACKWARD]
    for step in steps:
        within = [event for event in ranges if step["ts"] <= event["ts"] and end(event) <= end(step)]
        assert [event["name"] for event in within] == names  # each once, in the order of time
        assert all(event["dur"] > 0 for event in within)


def test_slices_form_a_tree(traced):
    slices, _, _ = traced
    assert len(slices) > 1000
    assert overlaps(slices) == []


@pytest.mark.parametrize(
    ("phase", "op"),
    [
        ("gate", "aten::linear"),
        ("select", "_Select"),
        ("dispatch", "moe_lightning::permute"),
        ("experts", "aten::silu"),
        ("combine", "moe_lightning::unpermute"),
        ("select/backward", "_SelectBackward"),
        ("dispatch/backward", "moe_lightning::permute_backward"),
        ("experts/backward", "aten::silu_backward"),
        ("combine/backward", "moe_lightning::unpermute_backward"),
    ],
)
def test_a_range_holds_what_its_phase_does(traced, phase, op):
    """That is, every range of the phase holds the op, and no range of another; validation has it outside all."""
    slices, _, _ = traced
    ops = [event for event in slices if event["name"] == op]
    holders = [r for r in ranges_of(slices) if any(r["ts"] <= e["ts"] and end(e) <= end(r) for e in ops)]
    assert [r["name"].split("/", 2)[2] for r in holders] == [phase] * (LAYERS * ACTIVE)


def test_other_timers_go_on_and_the_layers_are_left_as_they_were(traced):
    _, model, timing = traced
    assert all(layer.hook is no_hook for layer in moe_layers(model))
    assert timing.run_times().milliseconds["T_experts"] > 0


def test_only_traced_steps_carry_marks(tmp_path):
    marked = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            marked.append([layer.hook is not no_hook for layer in moe_layers(module)])

    fit([trace(tmp_path), Look()], batches=6)
    assert marked == [[i in (2, 3)] * LAYERS for i in range(6)]


def test_off_does_nothing(tmp_path):
    folder = tmp_path / "traces"
    marks = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            marks.extend(layer.hook for layer in moe_layers(module))

    fit([trace(folder, enabled=False), Look()], batches=4)
    assert len(marks) == 4 * LAYERS
    assert all(mark is no_hook for mark in marks)
    assert not folder.exists()


@pytest.mark.parametrize("broken_at", [0, 3])
def test_a_run_that_breaks_off_keeps_the_steps_it_traced(tmp_path, broken_at):
    class Break(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            if trainer.global_step == broken_at:
                raise RuntimeError("power cut")

    model = tiny_model()
    with pytest.raises(RuntimeError, match="power cut"):
        fit([trace(tmp_path), Break()], model, batches=6)
    assert all(layer.hook is no_hook for layer in moe_layers(model))
    names = Counter(event["name"] for path in tmp_path.iterdir() for event in ranges_of(read(path)))
    assert names["moe/L0/gate"] == (2 if broken_at else 0)
    assert names["moe/L0/gate/backward"] == (1 if broken_at else 0)


def test_a_run_too_short_says_so(tmp_path):
    with pytest.warns(UserWarning, match="trace: training must go on for more than wait.*got wait=1, warmup=1"):
        fit([trace(tmp_path)], batches=2)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_traced_without_ranges(tmp_path):
    fit([trace(tmp_path, wait=0, active=1)], MLPModule(64, 16), batches=3)
    [path] = tmp_path.iterdir()
    slices = read(path)
    assert any(event["name"] == "aten::linear" for event in slices)
    assert ranges_of(slices) == []


@pytest.mark.parametrize("options", [{"wait": -1}, {"warmup": 0}, {"active": 0}])
def test_impossible_steps_are_refused(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=rf"^trace: {name} must .*got {name}={value}$"):
        Trace(**options)


def test_a_folder_that_cannot_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^trace: the folder must be one that can be written, got .*file/x"):
        fit([trace(tmp_path / "file" / "x")], batches=1)


def test_two_profilers_are_refused_in_one_line(tmp_path):
    trainer = SimpleNamespace(profiler=PyTorchProfiler(dirpath=tmp_path))
    with pytest.raises(ValueError, match=r"^trace: torch's profiler can run once at a time, got trace.enabled=true"):
        trace(tmp_path).setup(trainer, tiny_model(), "fit")
    trace(tmp_path, enabled=False).setup(trainer, tiny_model(), "fit")


@pytest.mark.gpu
def test_on_a_gpu_every_phase_launches_kernels(tmp_path):
    fit([trace(tmp_path)], batches=6, accelerator="gpu")
    [path] = tmp_path.iterdir()
    found = bench_trace.read_trace(path)
    assert found.on_gpu
    assert len(found.ranges) == LAYERS * ACTIVE * (len(FORWARD) + len(BACKWARD))
    for phase, overlap in bench_trace.by_phase(found).items():
        assert overlap.comp_us > 0, phase
        assert overlap.comm_us == 0, phase
    host = [event for event in read(path) if event["cat"] in ("cpu_op", "user_annotation")]
    assert overlaps(host) == []
