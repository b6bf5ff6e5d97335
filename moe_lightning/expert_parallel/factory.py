"""Each layer's dispatcher across the ranks of a group."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from moe_lightning.expert_parallel.all_to_all import AllToAllDispatcher
from moe_lightning.expert_parallel.collectives import check_agreement
from moe_lightning.expert_parallel.link import choose_chunks
from moe_lightning.expert_parallel.symmetric import SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers import MoE
from moe_lightning.routers import router_name

DISPATCHES = ("nccl", "gloo", "symmetric")


class DispatcherFactory:
    """Makes a dispatcher for each layer, and keeps what they share.

    Args:
        group: the ranks that hold the experts between them.
        device: of this rank.
        dispatch: one of `DISPATCHES`; None: all-to-alls by the backend that joins the ranks.
        max_tokens: see `SymmetricDispatcher`.
        check_counts: see `AllToAllDispatcher.debug_check_splits`.
        timeout: of a wait for another rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        dispatch: str | None,
        max_tokens: int | None,
        check_counts: bool,
        timeout: timedelta,
    ) -> None:
        self.group, self.device, self.dispatch = group, device, dispatch
        self.max_tokens, self.check_counts, self.timeout = max_tokens, check_counts, timeout
        self._memory: SymmetricMemory | None = None
        self._chunks: int | None = None

    def make(self, layer: MoE) -> AllToAllDispatcher | SymmetricDispatcher:
        """For one layer. A collective.

        Raises:
            ValueError: the layer's router moves no rows, or `dispatch` is not how the ranks are joined.
        """
        router, chunks = layer.router, layer.overlap_chunks
        if router.dispatch_mode != "permute":
            raise ValueError(
                f"strategy: ddp_ep needs a router that moves rows, got {router_name(router)}, under which every expert "
                "sees every token on one device; choose another --model.router, or --trainer.strategy ddp"
            )
        if self.dispatch == "symmetric":
            chunks = 1 if chunks == "auto" else chunks
            if self._memory is None:
                self._memory = SymmetricMemory.create(self.group, self.device, self.timeout.total_seconds())
            sizes = {"num_experts": layer.num_experts, "top_k": router.slots}
            check_agreement(self.group, **sizes, max_tokens=self.max_tokens or 0)
            return SymmetricDispatcher(**sizes, memory=self._memory, chunks=chunks, max_tokens=self.max_tokens)
        backend = dist.get_backend(self.group)
        if self.dispatch not in (None, backend):
            raise ValueError(
                f"strategy: dispatch must be symmetric or {backend}, as the ranks are joined by it, got "
                f"dispatch={self.dispatch}; leave it out"
            )
        if chunks == "auto":
            self._chunks = chunks = self._chunks or choose_chunks(self.group, self.device)
        check_agreement(self.group, num_experts=layer.num_experts, top_k=router.slots, overlap_chunks=chunks)
        dispatcher = AllToAllDispatcher(layer.num_experts, router.slots, layer.drops_tokens, self.group, chunks)
        dispatcher.debug_check_splits = self.check_counts
        return dispatcher

    def set_timeout(self, timeout: timedelta) -> None:
        """Of waits from now on."""
        self.timeout = timeout
        _set_pg_timeout(timeout, self.group)
        if self._memory is not None:
            self._memory.signals.set_timeout(timeout.total_seconds())

    def micro_batch(self) -> AbstractContextManager[None]:
        """Of training: `SymmetricMemory.micro_batch`."""
        return nullcontext() if self._memory is None else self._memory.micro_batch()

    def error(self) -> str | None:
        """Why a kernel ended this process's CUDA context; None if none did."""
        return None if self._memory is None else self._memory.signals.error()
