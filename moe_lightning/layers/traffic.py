"""How many rows go where: ranks tell each other, and their hosts, while other work goes on.

Legend: W ranks, C chunks, l experts of a rank in a chunk.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.layers.exchange import naming
from moe_lightning.ops.row_counts import Share, count_arriving, row_places


class Traffic:
    """Counts of rows that leave and come, on their way from the moment they are asked for.

    On a GPU they travel on the group's own stream: what the computing stream is given before they are read runs beside.

    Args:
        group: the ranks.
        leaving_WCL: int32 (W, C, l), rows of this rank for the experts of each.
        share: of this rank.
    """

    def __init__(self, group: dist.ProcessGroup, leaving_WCL: Tensor, share: Share) -> None:
        self._leaving_WCL, self._share = leaving_WCL, share
        self.arriving_WCL = torch.empty_like(leaving_WCL)
        with naming("dispatch/counts"):
            self._work = dist.all_to_all_single(self.arriving_WCL, leaving_WCL, group=group, async_op=True)

    @cached_property
    def _counted(self) -> tuple[list[list[list[int]]], tuple[Tensor, ...]]:
        with naming("dispatch/counts"):
            self._work.wait()
        totals_2CW, offsets_CL = count_arriving(self._leaving_WCL, self.arriving_WCL, self._share)
        if offsets_CL.is_cuda:
            torch.cuda.current_stream(offsets_CL.device).synchronize()
        return totals_2CW.tolist(), offsets_CL.unbind()

    def read(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows that leave and that come, by chunk and rank, with those that stay; waits for the counts of all ranks."""
        leaving, arriving = self._counted[0]
        return leaving, arriving

    @property
    def offsets(self) -> tuple[Tensor, ...]:
        """For each chunk int32 (l + 1): where each expert's rows begin."""
        return self._counted[1]

    @cached_property
    def places(self) -> tuple[Tensor, ...]:
        """For each chunk int32: where each of its rows, by rank and expert, stands by expert."""
        counts = [sum(chunk) for chunk in self.read()[1]]
        return row_places(self.arriving_WCL, sum(counts), self._share).split(counts)
