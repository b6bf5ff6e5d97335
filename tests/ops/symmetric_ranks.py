"""Several ranks, played by one process on one device: all signal, then each waits."""

import torch

from moe_lightning.ops import build_index
from moe_lightning.ops.symmetric import (
    FLAG_WORDS,
    Route,
    Signals,
    Steps,
    SymmetricTensor,
    barrier,
    exchange_counts,
    put,
)


class Ranks:
    """W ranks with E experts between them."""

    def __init__(self, world, experts, device, timeout_seconds=20):
        self.world, self.experts, self.device = world, experts, torch.device(device)
        self.local = experts // world
        flags = self.tensors((world, FLAG_WORDS), torch.int32)
        self.counts = self.tensors((2, world, experts + 1), torch.int32)
        self.signals = [
            Signals(rank, world, flags[rank], torch.zeros(2, dtype=torch.int32, device=device), timeout_seconds, None)
            for rank in range(world)
        ]

    def tensors(self, shape, dtype):
        """A symmetric tensor, as each rank sees it; zeros."""
        all_ranks = tuple(torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(self.world))
        peer_pointers_W = torch.tensor([t.data_ptr() for t in all_ranks], device=self.device)
        seen = all_ranks if self.device.type == "cpu" else ()
        return [SymmetricTensor(own, peer_pointers_W, seen) for own in all_ranks] if all_ranks else []

    def barrier(self):
        for steps in (Steps.SIGNAL, Steps.WAIT):
            for signals in self.signals:
                barrier(signals, steps)

    def routes(self, ids_WTK, capacity):
        """Each rank's route, and the offsets of the rows that come to it."""
        indices = [build_index(ids_TK, self.experts) for ids_TK in ids_WTK]
        for steps in (Steps.SIGNAL, Steps.WAIT):
            sent = [
                exchange_counts(*each, capacity, steps=steps)
                for each in zip(indices, self.counts, self.signals, strict=True)
            ]
        routes = [
            Route(ids_TK, index.inverse_perm_N, dst_offset_E, self.local)
            for ids_TK, index, (_, dst_offset_E) in zip(ids_WTK, indices, sent, strict=True)
        ]
        return routes, [offsets for offsets, _ in sent]

    def put(self, x_WTD, weights_WTK, routes, rows, row_weights=None):
        row_weights = row_weights or [None] * self.world
        for each in zip(x_WTD, weights_WTK, routes, rows, row_weights, self.signals, strict=True):
            put(*each, Steps.SIGNAL)
        for signals in self.signals:
            barrier(signals, Steps.WAIT)


def draw_ids(counts, experts, top_k, device, drop=0.0, hot=None):
    """Distinct experts for the tokens of each rank; `hot`: a rank all of whose tokens want the first experts."""
    ids_WTK = []
    for rank, tokens in enumerate(counts):
        ids_TK = torch.rand(tokens, experts).argsort(1)[:, :top_k].int()
        if rank == hot:
            ids_TK = torch.arange(top_k).int().repeat(tokens, 1)
        ids_TK[torch.rand(ids_TK.shape) < drop] = -1
        ids_WTK.append(ids_TK.to(device))
    return ids_WTK
