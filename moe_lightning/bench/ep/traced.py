"""eta_trace of a layer across ranks: how much of its exchanges runs beside computation, by the trace of each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_lightning.bench.trace.overlap import Overlap, of_layers
from moe_lightning.bench.trace.reading import read
from moe_lightning.bench.trace.recording import record
from moe_lightning.layers import MoE


def eta_trace(call: Callable[[], Any], moe: MoE, device: torch.device, folder: str, name: str) -> float | None:
    """Over all ranks, each of which writes a file; they start every call together. None where nothing travels."""

    def together() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        call()

    own = of_layers(read(record(together, [moe], device, folder, name, dist.get_rank())))
    sums = torch.tensor([own.comm_us, own.comp_us, own.overlap_us], device=device, dtype=torch.float64)
    dist.all_reduce(sums)
    return Overlap(*sums.tolist()).eta_trace
