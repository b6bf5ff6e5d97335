"""A rank that takes the mean of gradients itself, beside one that DDP gives."""

import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moe_lightning.training.strategy import average_gradients as module
from moe_lightning.training.strategy.average_gradients import average_gradients


class Branches(torch.nn.Module):
    """Four layers, of which each rank uses its own and the last none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.Linear(7, 5)
        self.even, self.odd, self.none = (torch.nn.Linear(5, 3, bias=False) for _ in range(3))

    def forward(self, x, rank):
        return (self.odd if rank % 2 else self.even)(self.all(x)).square().sum()


def rank_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=world, rank=rank)
    x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(rank))
    own, other = Branches(), DistributedDataParallel(Branches(), find_unused_parameters=True)
    with other.no_sync():
        other(x[0], rank).backward()
    other(x[1], rank).backward()
    expected = {name.removeprefix("module."): p.grad for name, p in other.named_parameters()}
    for bucket_bytes in (1 << 20, 64):
        module.BUCKET_BYTES = bucket_bytes
        for step in range(2):  # the second time they are where the first has put them
            for tokens in x:
                own(tokens, rank).backward()
            at = {name: p.grad.data_ptr() for name, p in own.named_parameters() if p.grad is not None}
            average_gradients(list(own.parameters()), world, dist.group.WORLD)
            for name, p in own.named_parameters():
                assert (p.grad is None) == name.startswith("none"), (name, step)
                if p.grad is not None:
                    assert p.grad.equal(expected[name]), (name, step)
                    assert p.grad.data_ptr() == at.get(name, p.grad.data_ptr()), (name, step)
                    p.grad.zero_()
            for p in ((own.odd, own.even)[rank % 2]).parameters():
                p.grad = None  # it is the other ranks'
    del other, expected, p
    gc.collect()  # DDP before its group: the last to hold it would wait, with the GIL, for a thread that needs the GIL
    dist.barrier()
    dist.destroy_process_group()
