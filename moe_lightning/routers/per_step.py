"""What routers learn without a gradient, once per optimizer step: biases and thresholds.

What they follow is gathered in forward passes and goes into them over all micro-batches and ranks: `update_biases` does
that, and the optimizer of a `LanguageModule` calls it after each step.

Legend: E experts, B bins.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lightning.routers.base import Router


class UpdatedPerStep(Router):
    """A router with a buffer that follows what its training passes gather, once per optimizer step."""

    #: Of the passes since the last update. No buffer: those are made equal on all ranks.
    gathered: Tensor | None = None

    @property
    @abstractmethod
    def gathers(self) -> tuple[int, ...]:
        """The shape of `gathered`."""

    def gathering(self, device: torch.device) -> Tensor | None:
        """What a pass adds to, in place, since a CUDA graph does; None where it is not one of training."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        if self.gathered is None or self.gathered.device != device:
            self.gathered = torch.zeros(self.gathers, device=device)
        return self.gathered

    @abstractmethod
    def update(self, gathered: Tensor) -> None:
        """Set the buffer after an optimizer step, from what all ranks have gathered."""


def histogram_quantile(counts_EB: Tensor, share: float, edges: Tensor) -> Tensor:
    """Below which this share of each row's counts lies (E), interpolated; bin b is from edges[b] to edges[b + 1]."""
    below_EB = counts_EB.cumsum(1)
    target_E1 = below_EB[:, -1:] * share
    bin_E1 = torch.searchsorted(below_EB, target_E1).clamp(max=counts_EB.shape[1] - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    before_E1 = below_EB.gather(1, bin_E1) - inside_E1
    low_E1, high_E1 = edges[bin_E1], edges[bin_E1 + 1]
    return (low_E1 + (high_E1 - low_E1) * (target_E1 - before_E1) / inside_E1.clamp(min=1.0)).squeeze(1)


@torch.no_grad()
def update_biases(module: nn.Module) -> None:
    """Bring biases and thresholds of a module's routers up to date with what all ranks have gathered, once per step.

    Equal on all ranks, and without waiting for the device. A collective where ranks are joined: all must call it.
    """
    routers = [part for part in module.modules() if isinstance(part, UpdatedPerStep) and part.gathered is not None]
    if not routers:
        return
    gathered = [router.gathered for router in routers if router.gathered is not None]
    if dist.is_available() and dist.is_initialized():
        flat = torch.cat([one.flatten() for one in gathered])
        dist.all_reduce(flat)
        parts = flat.split([one.numel() for one in gathered])
        totals = [part.view_as(one) for part, one in zip(parts, gathered, strict=True)]
    else:
        totals = gathered
    for router, total, own in zip(routers, totals, gathered, strict=True):
        router.update(total)
        own.zero_()
