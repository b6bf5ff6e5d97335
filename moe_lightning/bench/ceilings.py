"""What this machine reaches: a large copy and a large matrix product, timed in the run they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console

from moe_lightning.bench.accounting import Ceilings
from moe_lightning.bench.settings import Settings
from moe_lightning.bench.spread import Spread, noise

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far beyond any cache
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def measured_ceilings(settings: Settings, console: Console) -> Ceilings:
    """Measure and say them."""
    with console.status("measuring what this machine reaches"):
        ceilings = measure_ceilings(settings.device, settings.dtype)
    spread = ceilings.spread
    console.print(
        f"{settings.device_name}: copy {ceilings.copy / 1e9:,.1f} GB/s {spread['copy']}, "
        f"{settings.dtype_name} matmul {ceilings.matmul / 1e12:,.2f} TFLOP/s {spread['matmul']}"
    )
    if line := noise(spread):
        console.print(f"{line}; the floors are of the fastest of three")
    return ceilings


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth (bytes read plus bytes written a second) and FLOPs a second in `dtype`; best of three medians."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copies, products = _seconds_of_copies(device), _rounds(lambda: left @ right, device)
    spread = {"copy": Spread.of(copies), "matmul": Spread.of(products)}
    return Ceilings(2 * COPY_BYTES[device.type] / min(copies), 2 * size**3 / min(products), spread)


def _seconds_of_copies(device: torch.device) -> list[float]:
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    if device.type == "cpu":
        return _rounds(lambda: target.copy_(source), device)
    # On a GPU copy_ is a copy engine's job; a kernel that writes what it reads is what the phases are made of.
    return _rounds(lambda: torch.neg(source, out=target), device)


def _rounds(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Three medians of five calls."""
    call()
    return [median(_seconds(call, device) for _ in range(5)) for _ in range(3)]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)
