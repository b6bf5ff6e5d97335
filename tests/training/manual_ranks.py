"""`manual_ranks.py EP_SIZE DISPATCH`: a rank of a module that calls backward twice per step, under manual optimization.

On each rank it leaves the weights, and which parameters have no gradient.
"""

import os
import sys

import lightning as L
import torch
from torch.utils.data import DataLoader

from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ROUTERS
from moe_lightning.training.strategy import ExpertParallelStrategy

WIDTH, EXPERTS, STEPS, RATE = 8, 4, 3, 0.5


def batches(rank: int) -> torch.Tensor:
    """Tokens (STEPS, 2, T, D) of a rank; it has its own number T."""
    return torch.randn(STEPS, 2, 5 + rank % 2, WIDTH, generator=torch.Generator().manual_seed(rank))


class TwoBackwards(L.LightningModule):
    """An MoE layer, a layer that rank zero alone uses, and one that is never used.

    Args:
        rank: whose loss it is.
        spare: whether there are the other two layers.
    """

    def __init__(self, rank: int, spare: bool):
        super().__init__()
        self.automatic_optimization = False
        self.rank = rank
        torch.manual_seed(0)
        self.moe = MoE(ROUTERS["naive_topk"](WIDTH, EXPERTS, 2), Experts(WIDTH, WIDTH, EXPERTS))
        with torch.no_grad():
            for parameter in self.moe.parameters():
                parameter.mul_(20)
        self.sometimes = torch.nn.Linear(WIDTH, WIDTH) if spare else None
        self.never = torch.nn.Linear(WIDTH, WIDTH) if spare else None

    def loss(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD = x_TD + self.moe(x_TD)[0]
        return (self.sometimes(y_TD) if self.sometimes is not None and self.rank == 0 else y_TD).square().mean()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for x_TD in batch:
            self.manual_backward(self.loss(x_TD))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


if __name__ == "__main__":
    ep_size, dispatch = int(sys.argv[1]), None if sys.argv[2] == "None" else sys.argv[2]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module = TwoBackwards(rank, spare=dispatch == "symmetric")
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    strategy = ExpertParallelStrategy(ep_size=ep_size, dispatch=dispatch)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_epochs=1, use_distributed_sampler=False, **off
    )
    trainer.fit(module, DataLoader(batches(rank), batch_size=None))
    weights = {name: p.detach() for name, p in module.named_parameters()}
    without = [name for name, p in module.named_parameters() if p.grad is None]
    torch.save({"weights": weights, "without": without}, f"manual-{rank}.pt")
