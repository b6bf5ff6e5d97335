"""A trace in figures: time of every phase, communication, computation, and how much of the former the latter hides.

    python -m moe_lightning.bench trace log/moe_trace/rank0.*.pt.trace.json.gz

docs/profiling.md says what the columns mean.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_lightning.bench.cli import Parser
from moe_lightning.callbacks.trace import StepTrace
from moe_lightning.layers import MoE

Interval = tuple[float, float]
_RANGE = re.compile(r"moe/L(\d+)/(\w+)(/backward)?")
_NCCL = "nccl"
#: What autograd and c10d record around the ops of tensors may hold a wait.
_TENSOR_OPS = ("aten::", "moe_lightning::")
STEPS = 3


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The set that any intervals cover; empty ones are left out."""
    merged: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """What both sets cover."""
    both = []
    i = j = 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            both.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def length(intervals: list[Interval]) -> float:
    """Of all intervals of a set together."""
    return sum(end - begin for begin, end in intervals)


@dataclass(frozen=True)
class Range:
    """A phase of one layer in one step, on the host; microseconds."""

    phase: str
    """gate, select, ...; with /backward."""
    layer: int
    thread: tuple[Any, Any]
    interval: Interval


@dataclass
class Work:
    """Communication and computation as sets of intervals, microseconds."""

    comm: list[Interval] = field(default_factory=list)
    comp: list[Interval] = field(default_factory=list)


@dataclass(frozen=True)
class TraceFile:
    """Of one rank."""

    steps: int
    on_gpu: bool
    ranges: list[Range]
    whole: Work
    phases: dict[str, Work]
    """Of all layers and steps, by `Range.phase`, in the order of time."""


def read_trace(path: Path | str) -> TraceFile:
    """Read a trace of torch.profiler, gzipped or not; ValueError for what is none."""
    slices = _slices(Path(path))
    ranges = sorted(_ranges(slices), key=lambda one: one.interval)
    kernels = [event for event in slices if event.get("cat") == "kernel"]
    phases = {one.phase: Work() for one in ranges}
    whole = Work()
    if kernels:
        launches = _launches(slices)
        owners = _Owners(ranges)
        for kernel in kernels:
            works = [whole]
            phase = owners.phase(launches.get(kernel.get("args", {}).get("correlation")))
            if phase is not None:
                works.append(phases[phase])
            for work in works:
                (work.comm if _NCCL in kernel["name"].lower() else work.comp).append(_interval(kernel))
        for work in (whole, *phases.values()):
            work.comm, work.comp = union(work.comm), union(work.comp)
    else:
        ops = [event for event in slices if event.get("cat") == "cpu_op" and event["name"].startswith(_TENSOR_OPS)]
        whole.comm = union(_interval(event) for event in slices if event["name"].startswith("gloo:"))
        whole.comp = union(map(_interval, ops))
        for phase, work in phases.items():
            within = union(one.interval for one in ranges if one.phase == phase)
            work.comm, work.comp = intersection(whole.comm, within), intersection(whole.comp, within)
    steps = sum(event["name"].startswith("ProfilerStep#") and event["cat"] == "user_annotation" for event in slices)
    return TraceFile(steps, bool(kernels), ranges, whole, phases)


def _slices(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes()
        if text.startswith(b"\x1f\x8b"):
            text = gzip.decompress(text)
        events = json.loads(text)["traceEvents"]
    except OSError as error:
        raise ValueError(
            f"bench.trace: the file must be one that can be read, got {path} ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise ValueError(
            f"bench.trace: the file must be a trace of torch.profiler, got {path}; make one with --trace.enabled true"
        ) from error
    return [event for event in events if event.get("ph") == "X"]


def _ranges(slices: list[dict[str, Any]]) -> list[Range]:
    ranges = []
    for event in slices:
        match = _RANGE.fullmatch(event["name"])
        if match and event["cat"] == "user_annotation":
            layer, name, backward = match.groups()
            thread = (event["pid"], event["tid"])
            ranges.append(Range(name + (backward or ""), int(layer), thread, _interval(event)))
    return ranges


def _launches(slices: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The host's call that launched a kernel, by correlation."""
    calls = (event for event in slices if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {event.get("args", {}).get("correlation"): event for event in calls}


class _Owners:
    """Which range a point in time of a thread is in: ranges of a thread do not overlap."""

    def __init__(self, ranges: list[Range]) -> None:
        self._by_thread: dict[tuple[Any, Any], list[Range]] = {}
        for one in ranges:
            self._by_thread.setdefault(one.thread, []).append(one)
        self._begins = {thread: [r.interval[0] for r in own] for thread, own in self._by_thread.items()}

    def phase(self, call: dict[str, Any] | None) -> str | None:
        if call is None:
            return None
        thread = (call["pid"], call["tid"])
        i = bisect_right(self._begins.get(thread, []), call["ts"]) - 1
        if i < 0:
            return None
        last = self._by_thread[thread][i]
        return last.phase if call["ts"] < last.interval[1] else None


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


@dataclass(frozen=True)
class Overlap:
    """Microseconds."""

    comm_us: float
    comp_us: float
    overlap_us: float
    """Of the communication, during any computation of the rank."""

    @property
    def eta_trace(self) -> float | None:
        """0: the rank waits for all of it; 1: all is hidden. None where nothing is communicated."""
        return self.overlap_us / self.comm_us if self.comm_us else None

    def __add__(self, other: Overlap) -> Overlap:
        """Of two ranks, or of two phases."""
        sums = self.comm_us + other.comm_us, self.comp_us + other.comp_us, self.overlap_us + other.overlap_us
        return Overlap(*sums)


def overlap_of(work: Work, whole: Work) -> Overlap:
    """A part's communication against the computation of the whole."""
    return Overlap(length(work.comm), length(work.comp), length(intersection(work.comm, whole.comp)))


def by_phase(trace: TraceFile) -> dict[str, Overlap]:
    """In the order of time."""
    return {phase: overlap_of(work, trace.whole) for phase, work in trace.phases.items()}


def of_layers(trace: TraceFile) -> Overlap:
    """All phases together, without what the rest of a step communicates."""
    return sum(by_phase(trace).values(), Overlap(0.0, 0.0, 0.0))


def of_trace(trace: TraceFile) -> Overlap:
    """The whole trace, with the averaging of gradients."""
    return overlap_of(trace.whole, trace.whole)


def record_trace(
    call: Callable[[], Any], layers: Sequence[MoE], device: torch.device, folder: str, name: str, rank: int = 0
) -> Path:
    """Trace `STEPS` calls, after one that is not kept, with the phases of these layers as ranges; the file."""
    worker = f"rank{rank}.{re.sub(r'[^A-Za-z0-9_.]+', '-', name)}"
    trace = StepTrace(layers, device, folder, worker, wait=0, warmup=1, active=STEPS)
    try:
        while not trace.done:
            trace.begin_step()
            call()
            trace.end_step()
    finally:
        trace.stop()
    assert trace.path is not None
    return trace.path


def table(trace: TraceFile) -> Table:
    """Milliseconds per step, of all layers together."""
    steps = max(trace.steps, 1)
    layers = len({one.layer for one in trace.ranges})
    title = f"{trace.steps} step{'s' if trace.steps != 1 else ''}, {layers} MoE layer{'s' if layers != 1 else ''}"
    rows = Table(title=f"{title}; ms per step", title_justify="left")
    rows.add_column("phase", no_wrap=True)
    for column in ("ranges", "host", "comm", "comp", "overlap", "eta_trace"):
        rows.add_column(column, justify="right", no_wrap=True)

    def add(name: str, ranges: list[Range] | None, overlap: Overlap) -> None:
        own = ("", "") if ranges is None else (str(len(ranges)), ms(sum(r.interval[1] - r.interval[0] for r in ranges)))
        eta = "-" if overlap.eta_trace is None else f"{overlap.eta_trace:.2f}"
        rows.add_row(name, *own, ms(overlap.comm_us), ms(overlap.comp_us), ms(overlap.overlap_us), eta)

    def ms(us: float) -> str:
        return f"{1e-3 * us / steps:,.3f}"

    for phase, overlap in by_phase(trace).items():
        add(phase, [r for r in trace.ranges if r.phase == phase], overlap)
    rows.add_section()
    add("MoE layers", trace.ranges, of_layers(trace))
    add("all of the trace", None, of_trace(trace))
    return rows


def comment(trace: TraceFile) -> str:
    """What comm and comp are here."""
    if not trace.on_gpu and not length(trace.whole.comm):
        return "no kernels and no gloo work in this trace: nothing is communicated, eta_trace is not defined"
    if not trace.on_gpu:
        return "no kernels in this trace: comm is gloo's work on its own threads, comp the ops of tensors"
    if not length(trace.whole.comm):
        return "no NCCL kernels in this trace: nothing is communicated by exchanges, eta_trace is not defined"
    return "comm: NCCL kernels, comp: all other kernels"


def main(arguments: list[str]) -> None:
    """Parse flags, read, print a table per file."""
    parser = Parser("trace", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="written by --trace or the Trace callback")
    console = Console(width=120)
    for path in parser.parse_args(arguments).files:
        trace = read_trace(path)
        console.print(path, soft_wrap=True)
        console.print(table(trace))
        console.print(comment(trace))
