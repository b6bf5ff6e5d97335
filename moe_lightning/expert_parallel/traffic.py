"""How many rows go where: ranks tell each other, and their hosts, while other work goes on.

Legend: W ranks, C chunks, l experts of a rank in a chunk.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.expert_parallel.exchange import naming
from moe_lightning.ops.row_counts import Share, count_arriving, row_places


class Traffic:
    """Counts of rows that leave and come, on their way from the beginning.

    On a GPU the computing stream waits for them, and what it is given afterwards runs while the host does.

    Args:
        group: the ranks.
        leaving_WCL: int32 (W, C, l), rows of this rank for the experts of each.
        share: of this rank.
        beside: the group's transfers have a stream of their own, and so have the counts: one communicator, one stream.
    """

    def __init__(self, group: dist.ProcessGroup, leaving_WCL: Tensor, share: Share, beside: bool = False) -> None:
        self._share = share
        self.arriving_WCL = torch.empty_like(leaving_WCL)
        with naming("dispatch/counts"):
            work = dist.all_to_all_single(self.arriving_WCL, leaving_WCL, group=group, async_op=beside)
            if work is not None:
                work.wait()
        self._totals_2CW, offsets_CL = count_arriving(leaving_WCL, self.arriving_WCL, share)
        self.offsets = offsets_CL.unbind()
        """For each chunk int32 (l + 1): where each expert's rows begin."""
        self._counted = torch.cuda.Event() if offsets_CL.is_cuda else None
        if self._counted is not None:
            self._counted.record()

    @cached_property
    def _totals(self) -> list[list[list[int]]]:
        if self._counted is not None:
            self._counted.synchronize()
        return self._totals_2CW.tolist()

    def read(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows that leave and that come, by chunk and rank, with those that stay; waits for the counts of all ranks."""
        leaving, arriving = self._totals
        return leaving, arriving

    @cached_property
    def places(self) -> tuple[Tensor, ...]:
        """For each chunk int32: where each of its rows, by rank and expert, stands by expert."""
        counts = [sum(chunk) for chunk in self.read()[1]]
        return row_places(self.arriving_WCL, sum(counts), self._share).split(counts)
