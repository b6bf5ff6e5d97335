"""Traces of a few calls of a layer: `--trace` of the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lightning.callbacks.step_trace import StepTrace
from moe_lightning.layers import MoE

STEPS = 3


def record(
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
