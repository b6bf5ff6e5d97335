"""A rank that trains layers a thousand steps on random numbers of tokens, imported there."""

import ctypes
import gc
import os
import random
import re
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_lightning.expert_parallel.all_to_all import AllToAllDispatcher
from moe_lightning.expert_parallel.symmetric import SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ROUTERS

EXPERTS, TOP_K, WIDTH, HIDDEN, MOST_TOKENS = 8, 2, 256, 16, 128
WARM_UP, STEPS = 100, 1000


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc, ten numbers."""

    _fields_ = [(f"bytes_{i}", ctypes.c_size_t) for i in range(10)]


def allocated() -> int:
    """Bytes that malloc has given out and not got back."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return info.bytes_4 + info.bytes_7  # mapped, and of the heaps


def tensors() -> int:
    """The least of a few looks: gloo's threads let go of a collective's tensors a moment after it is over."""
    looks = []
    for _ in range(5):
        dist.barrier()
        gc.collect()
        looks.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    return min(looks)


def held() -> dict[str, int]:
    """What this process holds of the machine."""
    return {
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "tensors": tensors(),
        "shared maps": len(re.findall("moe_lightning-", Path("/proc/self/maps").read_text())),
        "allocated": allocated(),
    }


def layer(rank: int, world: int, dispatcher) -> MoE:
    torch.manual_seed(0)
    moe = MoE(ROUTERS["naive_topk"](WIDTH, EXPERTS, TOP_K), Experts(WIDTH, HIDDEN, EXPERTS), dispatcher)
    for name in ("up", "down"):
        whole = getattr(moe.experts, name).detach()
        setattr(moe.experts, name, torch.nn.Parameter(whole.chunk(world)[rank].clone()))
    return moe.train()


def step(moe: MoE, tokens: int) -> None:
    moe.zero_grad()
    x_TD = torch.randn(tokens, WIDTH, requires_grad=True)
    y_TD, _ = moe(x_TD)
    y_TD.square().sum().backward()
    for gradient in (x_TD.grad, *(parameter.grad for parameter in moe.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()


def rank_process(rank: int, world: int, folder: str) -> None:
    """Every dispatcher in turn; saves what was held after the warm-up and at the end, and how many ranks were idle."""
    torch.set_num_threads(1)
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"  # torch's record of collectives, which grows to its size
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), world_size=world, rank=rank)
    group = dist.group.WORLD
    memory = SymmetricMemory.create(group, torch.device("cpu"), 30)
    layers = [layer(rank, world, AllToAllDispatcher(EXPERTS, TOP_K, False, group, chunks)) for chunks in (1, 3)]
    layers.append(layer(rank, world, SymmetricDispatcher(EXPERTS, TOP_K, memory, max_tokens=MOST_TOKENS)))
    draw = random.Random(57)  # the same on every rank
    idle = [[0] * (world + 1) for _ in layers]
    for i in range(STEPS):
        if i == WARM_UP:
            before = held()
        turn = draw.randrange(len(layers))
        least = MOST_TOKENS if i < WARM_UP else 1  # so that the most memory has been needed once
        counts = [draw.choice((0, draw.randint(least, MOST_TOKENS))) for _ in range(world)]
        idle[turn][counts.count(0)] += 1
        step(layers[turn], counts[rank])
    torch.save((before, held(), idle), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()
