"""Traces of the whole layer with each router: `bench router --trace`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from moe_lightning.bench.accounting import Ceilings, Shape
from moe_lightning.bench.gpu_timing import side_stream
from moe_lightning.bench.router.case import Case, build_cases
from moe_lightning.bench.settings import Settings
from moe_lightning.bench.trace.recording import record


def write(shape: Shape, settings: Settings, ceilings: Ceilings, folder: str, progress: Progress) -> Iterator[str]:
    """A line for each strategy: its file, or why there is none."""
    stream = side_stream(settings.device) if settings.device.type == "cuda" else nullcontext()
    with stream:
        cases = build_cases(settings.strategies, shape, settings, ceilings)
        for name, case in progress.track(cases.items(), description="traces"):
            if case.without_layer is not None:
                yield f"trace: {name}: none, as {case.without_layer}"
            else:
                call = partial(_call, case, settings.backward)
                yield f"trace: {name}: {record(call, [case.moe], settings.device, folder, name)}"


def _call(case: Case, backward: bool) -> Any:
    if not backward:
        with torch.no_grad():
            return case.moe(case.x_TD)[0]
    y_TD = case.moe(case.x_TD)[0]
    return torch.autograd.grad(y_TD, (case.x_TD, *case.moe.parameters()), torch.ones_like(y_TD), allow_unused=True)
