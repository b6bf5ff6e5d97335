"""GPU times of a call: as it comes, as a CUDA graph with the L2 cache warm and cold, and what the host spends.

Everything runs on the current stream, which must be a side stream: graphs cannot be captured on the default one,
and autograd runs a backward pass on the stream of its forward pass. See `side_stream`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress
from torch.autograd import DeviceType

from moe_lightning.bench.calls import Call, CallFactory
from moe_lightning.bench.spread import Spread

WARM_UPS = 3
GRAPH_US = 2000  # what a graph should take at least, so that its own launch is lost in it
MOST_COPIES = 1000
PROBE_COPIES = 20
REPLAYS = 5  # back to back between two events
HELD_CYCLES = 4e9  # for each second that launching takes: twice that long
COLD_FACTOR = 2.5  # inputs of this many L2 sizes between two uses of the same
MOST_SETS = 256
QUEUE = 400  # launches in flight; the driver's queue holds about 1000, then the host waits


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream other than the default one, ordered after and before what runs there; starts with all free memory.

    Nothing on a CPU.
    """
    if device.type == "cpu":
        yield
        return
    torch.cuda.empty_cache()  # what an earlier case left cached does not count as free
    # Autograd's threads have no context until they need one; cuBLAS then factories it, and says so.
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
    outside = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


def measure_on_gpu(
    factories: dict[str, CallFactory], reads: dict[str, int], device: torch.device, rounds: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """eager_us, graph_us, cold_us, host_us and launches of each call; None for what could not be had."""
    results: dict[str, dict[str, Any]] = {}
    task = progress.add_task("launches", total=2 * len(factories) + rounds)
    calls = {name: make(False) for name, make in factories.items()}
    launches = {}
    for name, call in calls.items():
        launches[name] = count_launches(call)
        progress.advance(task)
    progress.update(task, description="eager")
    times = _eager_and_host(calls, launches, rounds, lambda: progress.advance(task))
    for name, make in factories.items():
        progress.update(task, description=f"graphs: {name}")
        eager_us, host_us = times[name]
        graph_us: Spread | None = None
        cold_us: Spread | None = None
        if launches[name] == 0:  # a view: an empty graph takes no time
            graph_us = cold_us = Spread.of([0.0] * rounds)
        elif can_be_captured(calls[name]):
            graph_us = cold_us = _graph_us(calls[name], eager_us.median, rounds)
            # Inputs that no cache holds are cold as they are.
            if graph_us is not None and cold_sets(reads[name], _l2_bytes(device)) > 1:
                cold_us = _cold_us(make, reads[name], device, rounds)
        results[name] = {
            "eager_us": eager_us,
            "graph_us": graph_us,
            "cold_us": cold_us,
            "host_us": host_us,
            "launches": launches[name],
        }
        progress.advance(task)
    progress.remove_task(task)
    return results


def count_launches(call: Call) -> int | None:
    """Kernels, memsets and memcpys of one call; None where the profiler sees no device activity."""
    for _ in range(WARM_UPS):
        call()
    try:
        # Nothing seen is no launch only if the profiler sees one that is surely there.
        return _device_events(call) or (0 if _device_events(lambda: torch.ones(1, device="cuda")) else None)
    except RuntimeError:  # no CUPTI, or another profiler holds it
        return None


def _device_events(call: Call) -> int:
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "profiler clears events at the end of each cycle": there is one cycle
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    return sum(
        event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        for event in profile.events()
    )


def _eager_and_host(
    calls: dict[str, Call], launches: dict[str, int | None], rounds: int, advance: Callable[[], Any]
) -> dict[str, tuple[Spread, Spread]]:
    """Microseconds per call between two events, and in an unsynchronised loop on the host; interleaved."""
    counts = {}
    for name, call in calls.items():
        probe_us, _ = _loop(call, 3)
        counts[name] = max(1, min(20, round(10_000 / probe_us), QUEUE // (launches[name] or 1)))
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            measured[name].append(_loop(call, counts[name]))
        advance()
    return {
        name: (Spread.of([e for e, _ in pairs]), Spread.of([h for _, h in pairs])) for name, pairs in measured.items()
    }


def _loop(call: Call, count: int) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    call()  # the first after a wait takes longer
    start.record()
    began = time.perf_counter()
    for _ in range(count):
        call()
    host_s = time.perf_counter() - began
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / count, 1e6 * host_s / count


def can_be_captured(call: Call) -> bool:
    """Whether the call never waits for the device.

    Asked before a capture: one that fails half-way leaves the allocator and the random generators in a bad state.
    """
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the synchronization debug mode is a prototype"
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return True


def _graph_us(call: Call, eager_us: float, rounds: int) -> Spread | None:
    """Microseconds a call in a graph of as many as it takes to last GRAPH_US, by a probe: eager calls may be slower."""
    copies = min(PROBE_COPIES, max(2, round(GRAPH_US / eager_us)))
    if copies == PROBE_COPIES:
        probed = replay_us([call] * copies, 3, copies)
        if probed is None:
            return None
        copies = min(MOST_COPIES, max(copies, round(GRAPH_US / probed.median)))
    return replay_us([call] * copies, rounds, copies)


def replay_us(calls: Sequence[Call], rounds: int, divide_by: float) -> Spread | None:
    """Microseconds of a graph that holds all calls, over `divide_by`; None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    for _ in range(WARM_UPS):
        graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPLAYS):
        graph.replay()
    host_s = time.perf_counter() - began
    measured = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The GPU is held until all is queued: launching a graph of small kernels can take longer than they do.
        torch.cuda._sleep(int(HELD_CYCLES * host_s))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        measured.append(1e3 * start.elapsed_time(end) / REPLAYS / divide_by)
    return Spread.of(measured)


def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def cold_sets(reads: int, l2_bytes: int) -> int:
    """Copies of the inputs that a cold graph goes round."""
    return max(1, min(MOST_SETS, -(-int(COLD_FACTOR * l2_bytes) // max(reads, 1))))


def _cold_us(make: CallFactory, reads: int, device: torch.device, rounds: int) -> Spread | None:
    """Microseconds a call in a graph that goes round copies of the inputs; where these are too small to push each
    other out, a read of a large buffer ends each round, and its own time is taken off.
    """
    l2_bytes = _l2_bytes(device)
    sets = cold_sets(reads, l2_bytes)
    calls = [make(True) for _ in range(sets)]
    for call in calls:
        call()
    if sets < MOST_SETS or reads * sets >= COLD_FACTOR * l2_bytes:
        return replay_us(calls, rounds, sets)
    buffer, total = torch.ones(int(COLD_FACTOR * l2_bytes) // 4, device=device), torch.empty((), device=device)

    def flush() -> None:
        torch.sum(buffer, dim=0, out=total)

    flush()
    flush_us, both_us = replay_us([flush] * 4, rounds, 4), replay_us([*calls, flush], rounds, 1)
    if flush_us is None or both_us is None or both_us.median <= flush_us.median:
        return None
    return both_us.scaled(1 / sets, -flush_us.median)
