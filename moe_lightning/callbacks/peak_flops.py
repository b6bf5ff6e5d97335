"""Peak matrix-product rate of a device, the denominator of MFU."""

from __future__ import annotations

import time

import torch
from lightning.fabric.utilities.throughput import get_available_flops

#: Dense bf16 and fp16 peak of devices that Lightning does not know (NVIDIA H200 datasheet), FLOP/s.
_DATASHEET = {"NVIDIA H200": 989e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: a GPU's datasheet figure for `dtype`, else the best of a few matrix products measured here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if dtype in (torch.bfloat16, torch.float16) and name in _DATASHEET:
            return _DATASHEET[name]
        known = get_available_flops(device, dtype)
        if known:
            return float(known)
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        began = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
