"""What a rank of the parallel dispatch's tests runs, imported there."""

from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from moe_lightning.expert_parallel.all_to_all import AllToAllDispatcher
from moe_lightning.expert_parallel.collectives import AllToAll, check_splits
from moe_lightning.expert_parallel.factory import DispatcherFactory
from moe_lightning.expert_parallel.symmetric import SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ROUTERS

EXPERTS, TOP_K, WIDTH, HIDDEN = 12, 3, 16, 24


def whole_layer(top_k: int = TOP_K, **options) -> MoE:
    """The same on every rank."""
    torch.manual_seed(0)
    moe = MoE(ROUTERS["naive_topk"](WIDTH, EXPERTS, top_k, **options), Experts(WIDTH, HIDDEN, EXPERTS))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.mul_(8)
    return moe.train()


def tokens_of(rank: int, count: int):
    """Tokens and the gradient of the output."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(count, WIDTH, generator=generator) for _ in range(2)]


#: (send, receive) of each rank; the first agree, in the others one expects another number.
WRONG = (
    [([0, 2, 1], [0, 3, 1]), ([3, 0, 0], [2, 0, 4]), ([1, 4, 0], [1, 0, 0])],
    [([0, 2, 1], [0, 3, 1]), ([3, 0, 0], [3, 0, 4]), ([1, 4, 0], [1, 0, 0])],
)


def message(call) -> str:
    """What a ValueError says; nothing if there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


class Case(NamedTuple):
    """Tokens of each rank, chunks, and options of the router, its top_k among them."""

    counts: tuple[int, ...]
    chunks: int = 1
    options: dict = {}  # noqa: RUF012
    check_splits: bool = False
    symmetric: bool = False


def rank_process(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    """Forward and backward with this rank's experts alone, case after case; saved for the tests to compare."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN, which must not be read
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), world_size=world, rank=rank)
    memory = SymmetricMemory.create(dist.group.WORLD, torch.device("cpu"), 30)
    for i, case in enumerate(cases):
        moe = whole_layer(**case.options)
        share = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
        for name in ("up", "down"):
            setattr(moe.experts, name, torch.nn.Parameter(getattr(moe.experts, name)[share].clone()))
        top_k = case.options.get("top_k", TOP_K)
        may_drop = "capacity_factor" in case.options
        if case.symmetric:
            moe.dispatcher = SymmetricDispatcher(EXPERTS, top_k, memory, case.chunks)
        else:
            moe.dispatcher = AllToAllDispatcher(EXPERTS, top_k, may_drop, dist.group.WORLD, case.chunks)
            moe.dispatcher.debug_check_splits = case.check_splits
        x_TD, grad_TD = tokens_of(rank, case.counts[rank])
        x_TD.requires_grad_()
        with torch.autograd.set_detect_anomaly(not case.symmetric):  # those buffers have rows that are never filled
            y_TD, _ = moe(x_TD)
            y_TD.backward(grad_TD)
        gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
        torch.save({"y": y_TD.detach(), "x": x_TD.grad, **gradients}, f"{folder}/case-{i}-rank-{rank}.pt")
    errors = []
    for counts in WRONG if world == 3 else ():
        all_to_all = AllToAll(dist.group.WORLD, *counts[rank])
        errors.append(message(partial(check_splits, all_to_all, torch.device("cpu"))))
    layer = whole_layer()
    layer.overlap_chunks = 1 + rank
    factory = DispatcherFactory(dist.group.WORLD, torch.device("cpu"), None, None, False, timedelta(seconds=30))
    errors.append(message(partial(factory.make, layer)))
    torch.save(errors, f"{folder}/errors-{rank}.pt")
    dist.destroy_process_group()
