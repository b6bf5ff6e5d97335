"""Which buffer a pass of one dispatcher writes to: the first that no earlier pass still needs."""

from __future__ import annotations

import torch

from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.ops.symmetric import SymmetricTensor


class Lease:
    """A buffer's number, taken until nobody holds this object."""

    def __init__(self, number: int, free: set[int]) -> None:
        self.number = number
        self._free = free

    def __del__(self) -> None:
        self._free.add(self.number)


class Buffers:
    """Numbered buffers, made when they are first asked for and kept to the end: a captured graph may use them.

    All ranks must lease alike, as they do when they keep as many passes alive.
    """

    def __init__(self, memory: SymmetricMemory) -> None:
        self._memory = memory
        self._free: set[int] = set()
        self._count = 0
        self._captured: list[Lease] = []
        self._tensors: dict[tuple[int, tuple[int, ...], torch.dtype], SymmetricTensor] = {}

    def lease(self) -> Lease:
        """The lowest number that is free; a new one if none is. What a graph captures is taken for ever."""
        if self._free:
            number = min(self._free)
            self._free.remove(number)
        else:
            number, self._count = self._count, self._count + 1
        lease = Lease(number, self._free)
        if self._memory.is_capturing():
            self._captured.append(lease)
        return lease

    def tensor(self, lease: Lease, shape: tuple[int, ...], dtype: torch.dtype) -> SymmetricTensor:
        """The lease's tensor of this shape and dtype; the first time a collective."""
        key = lease.number, shape, dtype
        if key not in self._tensors:
            self._tensors[key] = self._memory.allocate(shape, dtype)
        return self._tensors[key]
