"""Memory that every rank of a group writes to and reads from.

On GPUs it is torch's symmetric memory, over NVLink. On the CPU, where it shows that the code is right, files that the
processes of a host map.

Legend: W ranks, R rows, D width.
"""

from __future__ import annotations

import math
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as torch_memory

from moe_lightning.ops.symmetric import FLAG_WORDS, Signals, SymmetricTensor

#: Of files that stay in memory, where there is one; else the folder of temporary files.
SHARED_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


class SymmetricMemory:
    """What the dispatchers of one group share: how ranks wait for each other, and scratch buffers.

    Made by `create`. Its methods are collectives, but for `is_capturing` and `micro_batch`.
    """

    signals: Signals

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        #: Micro-batches of training so far, and whether passes that begin now are of the last one.
        self.micro_batches = 0
        self.in_micro_batch = False
        self._scratch: dict[tuple[object, ...], SymmetricTensor] = {}
        self._retired: list[SymmetricTensor] = []
        self._handles: list[object] = []  # of what other ranks have mapped

    @classmethod
    def create(cls, group: dist.ProcessGroup, device: torch.device, timeout_seconds: float) -> SymmetricMemory:
        """A collective.

        Args:
            group: of the ranks, all on one host.
            device: of this rank.
            timeout_seconds: how long a kernel waits for a rank before it ends this process's CUDA context.

        Raises:
            ValueError: the ranks are on several hosts.
        """
        memory = cls(group, device)
        memory._check_one_host()
        flags = memory.allocate((memory.world, FLAG_WORDS), torch.int32)
        flags.own.zero_()
        state = torch.zeros(2, dtype=torch.int32, device=device)
        memory.signals = Signals(memory.rank, memory.world, flags, state, timeout_seconds, group)
        memory.barrier()  # all flags are zero before one is raised
        return memory

    def _check_one_host(self) -> None:
        hosts: list[str] = [""] * self.world
        dist.all_gather_object(hosts, socket.gethostname(), group=self.group)
        if len(set(hosts)) > 1:
            raise ValueError(
                f"dispatch: symmetric needs the ranks of a group on one host, got {', '.join(hosts)}; lower ep_size, "
                "or choose another dispatch"
            )

    def is_capturing(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Passes that begin meanwhile end, backward included, before the next micro-batch: see `BufferPool`."""
        self.micro_batches += 1
        self.in_micro_batch = True
        try:
            yield
        finally:
            self.in_micro_batch = False

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> SymmetricTensor:
        """A tensor of one shape on every rank, uninitialised.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        if self.is_capturing():
            raise RuntimeError(
                f"dispatch: buffers must be there before a CUDA graph is captured, got none of shape={shape}, "
                f"dtype={dtype}; run the same passes once before"
            )
        return self._allocate_cuda(shape, dtype) if self.device.type == "cuda" else self._allocate_cpu(shape, dtype)

    def scratch(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> SymmetricTensor:
        """The tensor of this use for all dispatchers of the group: rows (R, ...) of the largest one asked for."""
        rows, *rest = shape
        key = use, *rest, dtype
        if key not in self._scratch or self._scratch[key].own.shape[0] < rows:
            if key in self._scratch:  # a captured graph may use it, another rank may still read it
                self._retired.append(self._scratch[key])
            self._scratch[key] = self.allocate(shape, dtype)
        largest = self._scratch[key]
        return SymmetricTensor(largest.own[:rows], largest.peer_pointers_W, tuple(t[:rows] for t in largest.all_ranks))

    def barrier(self) -> None:
        """Wait on the host until all ranks' devices have done all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(group=self.group)

    def all_reduce_min_max(self, value: int) -> tuple[int, int]:
        """The least and the most of the ranks' numbers. Waits for the device."""
        most = torch.tensor([-value, value], device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        negative, positive = most.tolist()
        return -negative, positive

    def _allocate_cuda(self, shape: tuple[int, ...], dtype: torch.dtype) -> SymmetricTensor:
        own = torch_memory.empty(shape, dtype=dtype, device=self.device)
        handle = torch_memory.rendezvous(own, self.group)
        self._handles.append(handle)
        # A rank's tensor may begin anywhere in the memory that was exchanged.
        offsets: list[int] = [0] * self.world
        bases = handle.buffer_ptrs
        dist.all_gather_object(offsets, own.data_ptr() - bases[self.rank], group=self.group)
        addresses = [base + offset for base, offset in zip(bases, offsets, strict=True)]
        return SymmetricTensor(own, torch.tensor(addresses, device=self.device))

    def _allocate_cpu(self, shape: tuple[int, ...], dtype: torch.dtype) -> SymmetricTensor:
        count = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=SHARED_FOLDER, prefix="moe_lightning-") as file:
            file.truncate(max(count * dtype.itemsize, 1))
            names: list[str] = [""] * self.world
            dist.all_gather_object(names, file.name, group=self.group)
            tensors = tuple(self._map(Path(name), count, dtype).view(shape) for name in names)
            dist.barrier(group=self.group)  # all have opened it: the name is not needed any more
        addresses = torch.tensor([tensor.data_ptr() for tensor in tensors])
        return SymmetricTensor(tensors[self.rank], addresses, tensors)

    @staticmethod
    def _map(path: Path, count: int, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)
