"""What a trace file holds: ranges of phases, communication and computation.

With kernels in the trace, those of NCCL are communication and all others computation; each belongs to the phase in
which the host launched it. Without, as on a CPU: gloo's work, on threads of its own, is communication, the ops of
tensors are computation, and each belongs to the phase that it happens in.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.bench.trace.intervals import Interval, intersection, union

_RANGE = re.compile(r"moe/L(\d+)/(\w+)(/backward)?")
_NCCL = "nccl"
#: What autograd and c10d record around the ops of tensors may hold a wait.
_TENSOR_OPS = ("aten::", "moe_lightning::")


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


def read(path: Path | str) -> TraceFile:
    """Read a trace of torch.profiler, gzipped or not; ValueError for what is none."""
    slices = _slices(Path(path))
    ranges = sorted(_ranges(slices), key=lambda found: found.interval)
    kernels = [event for event in slices if event.get("cat") == "kernel"]
    phases = {found.phase: Work() for found in ranges}
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
            within = union(found.interval for found in ranges if found.phase == phase)
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
    found = []
    for event in slices:
        match = _RANGE.fullmatch(event["name"])
        if match and event["cat"] == "user_annotation":
            layer, name, backward = match.groups()
            thread = (event["pid"], event["tid"])
            found.append(Range(name + (backward or ""), int(layer), thread, _interval(event)))
    return found


def _launches(slices: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The host's call behind a kernel, by correlation."""
    calls = (event for event in slices if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {event.get("args", {}).get("correlation"): event for event in calls}


class _Owners:
    """Which range a moment of a thread is in: ranges of a thread follow one another."""

    def __init__(self, ranges: list[Range]) -> None:
        self._by_thread: dict[tuple[Any, Any], list[Range]] = {}
        for found in ranges:
            self._by_thread.setdefault(found.thread, []).append(found)
        self._begins = {thread: [r.interval[0] for r in own] for thread, own in self._by_thread.items()}

    def phase(self, call: dict[str, Any] | None) -> str | None:
        if call is None:
            return None
        thread = (call["pid"], call["tid"])
        i = bisect_right(self._begins.get(thread, []), call["ts"]) - 1
        if i < 0:
            return None
        found = self._by_thread[thread][i]
        return found.phase if call["ts"] < found.interval[1] else None


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]
