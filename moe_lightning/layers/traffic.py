"""How many rows go where: ranks tell each other, and their hosts, while other work goes on.

Legend: W ranks, L experts of each, C chunks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.layers.exchange import naming


class Traffic:
    """Counts of rows that leave and come, on their way from the moment they are asked for.

    On a GPU they travel on a stream of their own: what the computing stream is given meanwhile does not wait for them.

    Args:
        group: the ranks.
        leaving_WCL: int32, rows that leave this rank for the experts of each.
    """

    def __init__(self, group: dist.ProcessGroup, leaving_WCL: Tensor) -> None:
        device = leaving_WCL.device
        self._arrived: torch.cuda.Event | None = None
        stream = _stream(device) if device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
            leaving_WCL.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self._arriving_WCL = torch.empty_like(leaving_WCL)
            with naming("dispatch/counts"):
                dist.all_to_all_single(self._arriving_WCL, leaving_WCL, group=group)
            totals = torch.stack([leaving_WCL, self._arriving_WCL]).sum(3)
            offsets_CL = self._arriving_WCL.sum(0).cumsum(1)
            self._offsets = torch.nn.functional.pad(offsets_CL, (1, 0)).int()
            self._totals = totals
            if stream is not None:
                self._totals = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
                self._totals.copy_(totals, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record(stream)

    def read(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows that leave and that come, by chunk and rank; waits for the counts of all ranks."""
        if self._arrived is not None:
            self._arrived.synchronize()
        leaving, arriving = self._totals.transpose(1, 2).tolist()
        return leaving, arriving

    @property
    def arriving_CWL(self) -> Tensor:
        """int32: rows that come, by chunk, rank and expert; for the computing stream, after `read`."""
        return self._on_computing_stream(self._arriving_WCL).transpose(0, 1)

    @property
    def offsets(self) -> Tensor:
        """int32 (C, L + 1): where each expert's rows begin, by chunk; for the computing stream, after `read`."""
        return self._on_computing_stream(self._offsets)

    def _on_computing_stream(self, counts: Tensor) -> Tensor:
        if self._arrived is not None:
            counts.record_stream(torch.cuda.current_stream(counts.device))
        return counts


_streams: dict[torch.device, Any] = {}


def _stream(device: torch.device) -> Any:
    """One a device: counts of one layer after those of another."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
