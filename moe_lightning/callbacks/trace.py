"""A trace of a few steps by torch.profiler, with the phases of MoE layers as named ranges: moe/L3/select."""

from __future__ import annotations

import gzip
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule
from typing_extensions import override

from moe_lightning.callbacks.base import moe_layers
from moe_lightning.layers import MoE, Phase, Step, with_hook, without_hook
from moe_lightning.layers.phases import PHASES
from moe_lightning.utils.checks import check_not_negative, check_sizes
from moe_lightning.utils.files import atomic_path

_NODE = "autograd::engine::evaluate_function"


def nest(events: list[dict[str, Any]], prefix: str) -> None:
    """Move, in place, the ranges whose name begins with `prefix` to the bounds of the autograd nodes they cut.

    A hook on a gradient runs inside the record of the node that takes this gradient, so a range that one hook begins
    and another ends overlaps two such records, and viewers, which take slices as a tree, do not show it. The node
    belongs to the phase whose range begins in it: the range is moved to begin with that record, and to end where the
    record of its end begins.

    Args:
        events: "traceEvents" of a Chrome trace; those with ph "X" have ts and dur in microseconds.
        prefix: of the names of ranges.
    """
    nodes: dict[Any, list[tuple[float, float]]] = {}
    ranges = []
    for event in events:
        if event.get("ph") != "X":
            continue
        name = event["name"]
        if name.startswith(_NODE):
            nodes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        elif name.startswith(prefix) and event["cat"] == "user_annotation":
            ranges.append(event)
    for of_thread in nodes.values():
        of_thread.sort()
    for event in ranges:
        own = nodes.get(event["tid"], [])
        begin, end = event["ts"], event["ts"] + event["dur"]
        first, last = _around(own, begin), _around(own, end)
        if first == last:
            continue  # within one node, or outside all
        begin = begin if first is None else first[0]
        end = end if last is None else last[0]
        event["ts"], event["dur"] = begin, round(end - begin, 3)


def _around(nodes: list[tuple[float, float]], moment: float) -> tuple[float, float] | None:
    """The node that is being evaluated at a moment."""
    i = bisect_right(nodes, (moment, float("inf"))) - 1
    return nodes[i] if i >= 0 and nodes[i][0] < moment < nodes[i][1] else None


#: In the order of time. In backward, dispatch holds plan: no gradient passes between them.
FORWARD = tuple(phase.range for phase in PHASES)
BACKWARD = tuple(name for name in reversed(FORWARD) if name != Phase.INDEX.range)


class LayerRanges:
    """The `Hook` of one layer: a range is open from the begin of a phase to the next, forward and backward.

    A range of the backward pass begins and ends where a gradient arrives, inside what autograd itself records of the
    node that takes it: `nest` moves it in a written trace.

    Args:
        layer: its number, which the ranges are named by.
    """

    def __init__(self, layer: int) -> None:
        self._names: dict[Phase, str] = {phase: f"moe/L{layer}/{phase.range}" for phase in PHASES}
        self._forward: record_function | None = None
        self._backward: record_function | None = None
        self._phases: list[Phase] = []

    def __call__(self, phase: Phase, tensor: Tensor | None = None, _step: Step | None = None) -> None:
        """See `moe_lightning.layers.phases.Hook`."""
        self._forward = _next(self._forward, self._names.get(phase))
        if phase is Phase.LOGIT:
            self._phases = []
        if tensor is not None and tensor.requires_grad:
            # A phase whose end no gradient marks is not begun.
            begun = self._names[PHASES[phase - 1]] + "/backward" if self._phases else None
            self._phases.append(phase)
            tensor.register_hook(partial(self._gradient_arrived, begun))

    def _gradient_arrived(self, begun: str | None, gradient: Tensor) -> None:
        self._backward = _next(self._backward, begun)

    def close(self) -> None:
        """End what is open, as when a pass breaks off."""
        self._forward, self._backward = _next(self._forward, None), _next(self._backward, None)


def _next(open_range: record_function | None, name: str | None) -> record_function | None:
    """End one range and begin the next."""
    if open_range is not None:
        open_range.__exit__(None, None, None)
    if name is None:
        return None
    begun = record_function(name)
    begun.__enter__()
    return begun


#: Where traces go by default.
FOLDER = "log/moe_trace"


def make_folder(folder: Path | str) -> Path:
    """Raise ValueError where there can be none."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"trace: the folder must be one that can be written, got {folder} ({error.strerror}); choose another"
        ) from error
    return path


class StepTrace:
    """Traces `active` steps after `wait` and `warmup` ones into <folder>/<worker>.<time>.pt.trace.json.gz.

    Layers have hooks only during the steps that are recorded.

    Args:
        layers: whose phases become ranges.
        device: whose kernels are recorded in addition to the host's work.
        folder: made if it is not there.
        worker: what the file's name begins with; by rank, for one file each.
        wait: steps before anything is done.
        warmup: steps with the profiler on and nothing kept.
        active: steps that are kept.
    """

    def __init__(
        self,
        layers: Sequence[MoE],
        device: torch.device,
        folder: Path | str,
        worker: str,
        wait: int,
        warmup: int,
        active: int,
    ) -> None:
        self._folder, self._worker = make_folder(folder), worker
        self._layers = [(layer, LayerRanges(i)) for i, layer in enumerate(layers)]
        self._left = wait + warmup + active
        #: Steps, so far.
        self.recorded = 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._write,
        )
        #: The file, once it is written.
        self.path: Path | None = None
        self._profiler.start()

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self._left == 0

    def begin_step(self) -> None:
        """Attach the hooks if this step is recorded."""
        if self._profiler.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE):
            self.recorded += 1
            for layer, ranges in self._layers:
                layer.hook = with_hook(layer.hook, ranges)

    def end_step(self) -> None:
        """Detach the hooks; after the last step, write the file."""
        self._detach_hooks()
        self._left -= 1
        if self.done:
            self._profiler.stop()
        else:
            self._profiler.step()

    def stop(self) -> None:
        """Break off before all steps are taken: those recorded so far are written."""
        self._detach_hooks()
        if not self.done:
            self._left = 0
            self._profiler.stop()

    def _detach_hooks(self) -> None:
        for layer, ranges in self._layers:
            layer.hook = without_hook(layer.hook, ranges)
            ranges.close()

    def _write(self, profiler: profile) -> None:
        if not self.recorded:
            return
        path = self._folder / f"{self._worker}.{time.time_ns()}.pt.trace.json.gz"
        with atomic_path(path) as temporary:
            try:
                profiler.export_chrome_trace(str(temporary))
            finally:
                temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)  # the profiler's own
            trace = json.loads(temporary.read_bytes())
            trace["traceName"] = path.name
            nest(trace["traceEvents"], "moe/")
            # Not json.dump, which encodes piece by piece in Python.
            temporary.write_bytes(gzip.compress(json.dumps(trace).encode(), compresslevel=6))
        self.path = path


class Trace(L.Callback):
    """Writes <dirpath>/rank<r>.<time>.pt.trace.json.gz, one file per rank: ops, kernels, ranges moe/L<layer>/<phase>.

    A step is a micro-batch. Before the traced ones the layers have no hooks; after the last one the profiler is off.
    Writing takes seconds, which no other callback's times include. How to read it: docs/profiling.md.

    Args:
        enabled: off costs nothing.
        dirpath: folder of the files.
        wait: steps before the profiler starts: the first ones load libraries.
        warmup: steps that it runs without keeping anything; at least 1, as its own start is slow.
        active: steps that are traced.
    """

    def __init__(
        self, enabled: bool = False, dirpath: str = FOLDER, wait: int = 5, warmup: int = 2, active: int = 3
    ) -> None:
        check_not_negative("trace", "wait", wait)
        check_sizes("trace", warmup=warmup, active=active)
        self.enabled = enabled
        self.dirpath = dirpath
        self.wait, self.warmup, self.active = wait, warmup, active
        self._steps: StepTrace | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.enabled and isinstance(trainer.profiler, PyTorchProfiler):  # type: ignore[attr-defined]
            raise ValueError(
                "trace: torch's profiler can run once at a time, got trace.enabled=true and a PyTorchProfiler of the "
                "trainer's; leave one out"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled:
            worker, device = f"rank{trainer.global_rank}", trainer.strategy.root_device
            steps = self.wait, self.warmup, self.active
            self._steps = StepTrace(moe_layers(pl_module), device, self.dirpath, worker, *steps)

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        if self._steps is not None:
            self._steps.begin_step()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if self._steps is not None and self._written(self._steps.end_step) and self._steps.done:
            self._end()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        recorded = self._steps is not None and self._steps.recorded
        if self._steps is not None and self._end() is None and not recorded:
            rank_zero_warn(
                f"trace: training must go on for more than wait + warmup steps, got wait={self.wait}, "
                f"warmup={self.warmup} and no step after them: nothing is written; lower them"
            )

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._steps is not None:
            self._end()

    def _written(self, end: Callable[[], None]) -> bool:
        """Whether `end`, which may write the file, succeeded; training goes on without it."""
        try:
            end()
        except (OSError, json.JSONDecodeError) as error:  # the profiler cuts the file short without a word
            reason = error.strerror if isinstance(error, OSError) else "no room for all of it"
            rank_zero_warn(
                f"trace: {self.dirpath} cannot be written to, got {reason}; training goes on without a trace"
            )
            self._steps = None
            return False
        return True

    def _end(self) -> Path | None:
        assert self._steps is not None
        steps = self._steps
        path = steps.path if self._written(steps.stop) else None
        self._steps = None
        if path is not None:
            rank_zero_info(f"trace: {path}; open it at https://ui.perfetto.dev")
        return path
