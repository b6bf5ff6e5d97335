"""How fast the ranks reach each other, and into how many chunks that makes it pay to split a layer's rows."""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist

#: Bytes per second and direction, between those of PCIe and of NVLink: a threshold.
FAST_LINK = 100e9
#: For slower links, what was best on one of 22 GB/s.
SLOW_LINK_CHUNKS = 2
PROBE_BYTES = 2**24


def choose_chunks(group: dist.ProcessGroup, device: torch.device) -> int:
    """The same on every rank, by the slowest rank's link; a collective.

    Over a fast link, and on a CPU, more chunks cost more than they hide.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if device.type == "cpu" or world == 1:
        return 1
    each = PROBE_BYTES // (world - 1)
    splits = [0 if other == rank else each for other in range(world)]
    sent = torch.ones(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(7):  # the first ones connect the ranks
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        dist.all_to_all_single(received, sent, splits, splits, group=group)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(median(seconds[2:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return 1 if sum(splits) / float(slowest) > FAST_LINK else SLOW_LINK_CHUNKS
