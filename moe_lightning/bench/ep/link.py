"""What joins the ranks: its kind, and how fast it is at a size."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from moe_lightning.bench.ep.ranks import measure
from moe_lightning.bench.spread import Spread


def kind(device: torch.device) -> str:
    """NVLink or PCIe (peers reach each other's memory), or the host."""
    if device.type == "cpu":
        return "host memory (gloo)"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "through the host (NCCL_P2P_DISABLE=1)"
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    if not all(torch.cuda.can_device_access_peer(device.index, other) for other in others):
        return "through the host"
    return "NVLink" if _has_nvlink(device.index) else "PCIe, peer to peer"


def _has_nvlink(index: int) -> bool:
    try:
        import pynvml
    except ImportError:
        return torch.cuda.get_device_capability(index) >= (8, 0) and "PCIe" not in torch.cuda.get_device_name(index)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, 0))
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def bandwidth(bytes_to_others: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """An all_to_all in which each rank sends so many bytes to the others together, nothing to itself."""
    world, rank = dist.get_world_size(), dist.get_rank()
    each = max(1, bytes_to_others // (world - 1))
    splits = [0 if r == rank else each for r in range(world)]
    sent = torch.ones(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    spread = measure({"": lambda: dist.all_to_all_single(received, sent, splits, splits)}, rounds, device)[""]
    return transferred(sum(splits), spread)


def transferred(sent: int, us: Spread) -> dict[str, Any]:
    """What a rank sends in so many microseconds; GB/s of that direction alone, whatever comes meanwhile."""
    return {"bytes": sent, "us": us.median, "gb_per_s": sent / us.median / 1e3, "spread": {"us": us}}
