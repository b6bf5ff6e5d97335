"""What a rank of the two-process loss test runs, imported there."""

import torch
import torch.distributed as dist
from torch.multiprocessing import SimpleQueue

from moe_lightning.routers import NaiveTopK, Routing, load_balancing_loss


def rank_logits(rank: int) -> torch.Tensor:
    """Ranks differ in size and in what they prefer."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((12, 20)[rank], 4, generator=generator) + torch.eye(4)[rank] * 3


def report_losses(rank: int, folder: str, results: SimpleQueue) -> None:
    """Both scopes, the gradient of the global one, and the counts afterwards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        logits_TE = rank_logits(rank).requires_grad_()
        selection = NaiveTopK(8, 4, 2).select(logits_TE)
        routing = Routing(logits_TE, selection)
        counts = selection.tokens_per_expert_E.tolist()
        local, everywhere = load_balancing_loss(routing), load_balancing_loss(routing, scope="global")
        (gradient,) = torch.autograd.grad(everywhere, logits_TE)
        untouched = selection.tokens_per_expert_E.tolist() == counts
        results.put((rank, local.item(), everywhere.item(), gradient.tolist(), counts, untouched))
    finally:
        dist.destroy_process_group()
