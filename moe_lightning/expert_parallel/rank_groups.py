"""Which ranks hold the experts between them, and which hold the same ones.

Legend: W ranks, P = ep_size.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def make_rank_groups(ep_size: int | None, timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """This rank's P neighbours that share the experts, and the ranks that hold its own, None where no others do.

    Groups apart from DDP's, so that its reductions and the rows never wait for each other's turn. A collective.

    Args:
        ep_size: P; None: all ranks.
        timeout: of their collectives.

    Raises:
        ValueError: P does not divide W.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    size = ep_size or world
    if world % size:
        raise ValueError(f"strategy: ep_size must divide the number of ranks, got ep_size={size}, ranks={world}")
    sharing = [list(range(first, first + size)) for first in range(0, world, size)]
    alike = [list(range(first, world, size)) for first in range(size)] if size < world else []
    # Every rank must take part in the making of every group.
    groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in (*sharing, *alike)]
    own = [group for ranks, group in groups if rank in ranks]
    return own[0], own[1] if alike else None
