"""How much memory there is, and what is refused because it could never fit."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

ADVICE = (
    "turn down data.batch_size (trainer.accumulate_grad_batches keeps the tokens per step), data.seq_len or the model"
)
#: Where cgroups are mounted, and which are this process's.
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: By version: folder under the mount; files of limit and usage; the field of memory.stat that can be reclaimed.
_CGROUP_FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: (".", "memory.max", "memory.current", "inactive_file"),
}


@dataclass(frozen=True)
class HostMemory:
    """Bytes that this process may use, those already in use under that limit, and whose limit it is."""

    limit: int
    used: int
    source: str

    def __str__(self) -> str:
        return f"{gigabytes(self.used)} of {gigabytes(self.limit)} in use ({self.source})"


def host_memory() -> HostMemory:
    """The tightest limit: the machine's, a cgroup's (containers, batch systems), or the process's own (`ulimit -v`)."""
    limits = [_machine(), *_cgroups(_CGROUPS, _OWN_CGROUPS), *_process()]
    return min(limits, key=lambda memory: memory.limit - memory.used)


def check_fits_memory(component: str, parameters: int, **sizes: int) -> None:
    """Raise ValueError if `parameters` in torch's default dtype would not fit this process's memory.

    Models made on the meta device take no memory and are not checked. `sizes` are named in the error.
    """
    if torch.get_default_device().type == "meta":
        return
    needed, memory = parameters * torch.get_default_dtype().itemsize, host_memory()
    if needed > memory.limit:
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(
            f"{component}: the weights must fit in memory, {gigabytes(memory.limit)} ({memory.source}), got "
            f"{gigabytes(needed)} from {given}; make them smaller"
        )


def check_step_fits(weights: int, logits: int, batch: str, ranks: int = 1) -> None:
    """Raise ValueError if a training step could not fit in host memory, where a cgroup's limit ends a process silently.

    Args:
        weights: bytes of a rank's parameters; a gradient and AdamW's two moments take as many each.
        logits: of a rank's micro-batch; they are in fp32, as are their gradients.
        batch: what sets the number of logits, for the error.
        ranks: that share the memory.
    """
    memory = host_memory()
    state, activations = 4 * weights * ranks, 8 * logits * ranks
    if state + activations > memory.limit:
        raise ValueError(
            f"memory: a training step must fit in {gigabytes(memory.limit)} ({memory.source}), got at least "
            f"{gigabytes(state)} of weights, gradients and moments and {gigabytes(activations)} of logits with "
            f"gradients from {batch}; {ADVICE}"
        )


def gigabytes(size: float) -> str:
    """Three digits, in GB (10^9 bytes)."""
    return f"{size / 1e9:.3g} GB"


def _machine() -> HostMemory:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = total
    with suppress(OSError, StopIteration):  # Linux alone has it
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return HostMemory(total, total - available, "this machine's memory")


def _cgroups(mounted: Path, own: Path) -> Iterator[HostMemory]:
    """Limits of this process's cgroups and of those above them."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            hierarchy, limit, usage, cache = _CGROUP_FILES[1 if controllers else 2]
            group = Path(path.lstrip("/"))
            for folder in (group, *group.parents):  # in a container its own group may be the root, under another name
                with suppress(OSError, ValueError):  # "max" is no number and no limit
                    here = mounted / hierarchy / folder
                    size = int((here / limit).read_text())
                    fields = dict(line.split() for line in (here / "memory.stat").read_text().splitlines())
                    used = int((here / usage).read_text()) - int(fields.get(cache, 0))
                    yield HostMemory(size, used, "the limit of this cgroup")


def _process() -> Iterator[HostMemory]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield HostMemory(limit, pages * resource.getpagesize(), "the limit of this process, ulimit -v")
