"""Intervals, and eta_trace from small traces written by hand: kernels on a GPU, gloo's work on a CPU."""

import gzip
import json

import pytest

from moe_lightning.bench.__main__ import main
from moe_lightning.bench.commands.trace import (
    Overlap,
    by_phase,
    intersection,
    length,
    of_layers,
    of_trace,
    read_trace,
    union,
)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], []),
        ([(3, 3)], []),
        ([(5, 7), (1, 2)], [(1, 2), (5, 7)]),
        ([(1, 4), (2, 3)], [(1, 4)]),
        ([(1, 3), (2, 5), (5, 6), (8, 9)], [(1, 6), (8, 9)]),
    ],
)
def test_union(intervals, expected):
    assert union(intervals) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([], [(1, 2)], []),
        ([(1, 2)], [(2, 3)], []),
        ([(1, 5)], [(2, 3), (4, 9)], [(2, 3), (4, 5)]),
        ([(0, 2), (3, 6), (8, 9)], [(1, 4), (5, 10)], [(1, 2), (3, 4), (5, 6), (8, 9)]),
        ([(1, 5)], [(1, 5)], [(1, 5)]),
    ],
)
def test_intersection(a, b, expected):
    assert intersection(a, b) == expected
    assert intersection(b, a) == expected
    assert length(expected) == sum(end - begin for begin, end in expected)


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 9, "tid": tid, "args": args}


def launched(name, call_ts, ts, dur, correlation, tid=1, stream=7):
    """A kernel, and the host's call that launched it."""
    call = event("cuda_runtime", "cudaLaunchKernel", call_ts, 1, tid, correlation=correlation)
    return [call, event("kernel", name, ts, dur, stream, correlation=correlation)]


def write(path, events):
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, file)
    return path


@pytest.fixture
def gpu(tmp_path):
    """One step, one layer. Kernels run long after their launches; autograd has a thread of its own."""
    events = [
        event("user_annotation", "ProfilerStep#4", 0, 100),
        event("gpu_user_annotation", "moe/L0/experts", 210, 50, tid=7),
        event("user_annotation", "moe/L0/dispatch", 10, 10),
        event("user_annotation", "moe/L0/experts", 20, 10),
        event("user_annotation", "moe/L0/dispatch/backward", 60, 20, tid=2),
        *launched("gather", 12, 200, 10, 1),
        *launched("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", 15, 210, 40, 2, stream=8),
        *launched("gemm", 22, 220, 20, 3),
        *launched("gemm", 25, 235, 10, 4, stream=9),  # beside the first
        *launched("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", 65, 300, 10, 5, tid=2, stream=8),
        *launched("gemm", 66, 310, 5, 6, tid=2),
        *launched("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", 90, 400, 30, 7, stream=8),
        *launched("adam", 91, 410, 10, 8),
        event("kernel", "no launch known", 500, 5, 7, correlation=99),
    ]
    return write(tmp_path / "gpu.json.gz", events)


def test_kernels_belong_to_the_phase_that_launched_them(gpu):
    trace = read_trace(gpu)
    assert trace.on_gpu
    assert trace.steps == 1
    assert by_phase(trace) == {
        "dispatch": Overlap(40, 10, 25),  # 210 to 250, beside gemms from 220 to 245
        "experts": Overlap(0, 25, 0),
        "dispatch/backward": Overlap(10, 5, 0),
    }
    assert of_layers(trace) == Overlap(50, 40, 25)
    assert of_layers(trace).eta_trace == 0.5
    assert of_trace(trace) == Overlap(80, 55, 35)
    assert by_phase(trace)["experts"].eta_trace is None


def test_on_a_cpu_work_of_gloo_belongs_to_the_phase_it_happens_in(tmp_path):
    events = [
        event("user_annotation", "ProfilerStep#4", 0, 100),
        event("user_annotation", "ProfilerStep#5", 100, 100),
        event("user_annotation", "moe/L0/dispatch", 10, 20),
        event("user_annotation", "moe/L1/dispatch", 110, 20),
        event("user_annotation", "moe/L1/experts", 130, 20),
        event("cpu_op", "c10d::alltoall_base_", 12, 15),  # may hold a wait, and is no computation
        event("cpu_op", "_Finish", 12, 18),
        event("cpu_op", "aten::cat", 25, 10),
        event("cpu_op", "aten::mm", 135, 10),
        event("cpu_op", "moe_lightning::permute", 115, 5),
        event("user_annotation", "gloo:all_to_all", 15, 20, tid=3),
        event("user_annotation", "gloo:all_to_all", 118, 20, tid=4),
        event("user_annotation", "gloo:all_reduce", 160, 10, tid=4),
    ]
    trace = read_trace(write(tmp_path / "cpu.json", events))
    assert not trace.on_gpu
    assert trace.steps == 2
    assert by_phase(trace) == {"dispatch": Overlap(15 + 12, 5 + 5, 5 + 2), "experts": Overlap(8, 10, 3)}
    assert of_layers(trace) == Overlap(35, 20, 10)
    assert of_trace(trace) == Overlap(50, 25, 10 + 2 + 3)


def test_command(gpu, tmp_path, capsys):
    nothing = write(tmp_path / "nothing.json.gz", [event("cpu_op", "aten::mm", 1, 2)])
    assert main(["trace", str(gpu), str(nothing)]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in printed.splitlines() if "│" in line}
    assert [cell.strip() for cell in lines["dispatch"]] == ["1", "0.010", "0.040", "0.010", "0.025", "0.62"]
    assert "comm: NCCL kernels, comp: all other kernels" in printed
    assert "0 steps, 0 MoE layers" in printed
    assert "no kernels and no gloo work in this trace: nothing is communicated, eta_trace is not defined" in printed


@pytest.mark.parametrize("text", [None, b"", b"{}", b"[1]", b"\x1f\x8bnothing", b"text"])
def test_a_file_that_is_no_trace_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_bytes(text)
    assert main(["trace", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert f"got {path}" in error
    assert ("one that can be read" in error) == (text is None)
