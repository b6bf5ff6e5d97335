"""Peak matrix-product rate of a device, the denominator of MFU."""

from __future__ import annotations

import time

import torch
from lightning.fabric.utilities.throughput import get_available_flops

#: Dense bf16 and fp16 peak of devices that Lightning does not know (NVIDIA H200 datasheet), FLOP/s.
_DATASHEET = {"NVIDIA H200": 989e12}
#: A product that takes this long is the last one: no start waits for more than a second or so.
SLOW_SECONDS = 0.05


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


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of products of growing size, up to the first that takes SLOW_SECONDS.

    A processor without arithmetic of this type takes seconds for 1024^3; its rate is known long before.
    """
    best = 0.0
    for size in (64, 128, 256, 512, 1024):
        seconds = [_product_seconds(device, dtype, size)]
        if seconds[0] < SLOW_SECONDS:  # else too slow to be repeated; the first holds what is done once
            seconds += [_product_seconds(device, dtype, size) for _ in range(4)]
        best = max(best, 2 * size**3 / min(seconds))
        if min(seconds) >= SLOW_SECONDS:
            break
    return best


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    _synchronize(device)
    began = time.perf_counter()
    a @ a
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
