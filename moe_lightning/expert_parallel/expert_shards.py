"""The experts' parameters, sharded over a group of ranks, and the way back to whole tensors.

Legend: E experts, the first dimension of every expert parameter; W ranks of a group, rank r of which holds
[r E / W, (r + 1) E / W); P = ep_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lightning.layers import MoE


class ExpertShards:
    """The expert parameters of a model, by name, sharded in place.

    Args:
        module: holds MoE layers with all experts.
        group: of ranks that hold the experts between them.
        device: of this rank, where its collectives run.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._saves = dist.get_global_rank(group, 0) == 0  # the group of the rank that writes
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, MoE)]
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.experts.{own}".lstrip("."): parameter
            for name, layer in layers
            for own, parameter in layer.experts.named_parameters()
        }
        self._ids = {id(parameter) for parameter in self.parameters.values()}

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._ids

    @torch.no_grad()
    def shard_(self) -> None:
        """Keep this rank's shard; the parameters stay the same objects."""
        for parameter in self.parameters.values():
            parameter.data = self.local_shard(parameter.data).clone()

    @torch.no_grad()
    def unshard_(self) -> None:
        """Every rank gets all experts back. A collective."""
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.data = self.gather(parameter.data).to(parameter.device)

    def local_shard(self, whole: Tensor) -> Tensor:
        """This rank's shard of a tensor of all experts, a view."""
        size = whole.shape[0] // self.world
        return whole[self.rank * size : (self.rank + 1) * size]

    def gather(self, share: Tensor) -> Tensor:
        """The tensor of all experts, on this rank's device. A collective."""
        return torch.cat(self._parts(share))

    def _parts(self, share: Tensor) -> list[Tensor]:
        share = share.to(self.device).contiguous()
        parts = [torch.empty_like(share) for _ in range(self.world)]
        dist.all_gather(parts, share, group=self.group)
        return parts

    def _save(self, share: Tensor, keep: bool) -> Tensor:
        parts = self._parts(share)
        return torch.cat([part.cpu() for part in parts]) if keep else share

    # ---- states, as one rank would save them -------------------------------------------------------------
    def gather_model_state(self, state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """A collective of the group that has global rank zero, which keeps whole experts, on the CPU."""
        if not self._saves:
            return state
        return {name: self._save(value, keep) if name in self.parameters else value for name, value in state.items()}

    def shard_model_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank loads."""
        return {name: self.local_shard(value) if name in self.parameters else value for name, value in state.items()}

    def gather_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any], keep: bool) -> dict[str, Any]:
        """As `gather_model_state`."""
        if not self._saves:
            return state
        return self._map_optimizer_state(optimizer, state, lambda value: self._save(value, keep), 1)

    def shard_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """What this rank loads."""
        return self._map_optimizer_state(optimizer, state, self.local_shard, self.world)

    def _map_optimizer_state(
        self, optimizer: Optimizer, state: dict[str, Any], change: Callable[[Tensor], Tensor], parts: int
    ) -> dict[str, Any]:
        """Change the tensors that belong to an expert parameter and have `parts` times its experts."""
        changed = dict(state["state"])
        for i, parameter in _parameter_indices(optimizer):
            if parameter not in self or i not in changed:
                continue
            shape = (parts * parameter.shape[0], *parameter.shape[1:])
            changed[i] = {
                name: change(value) if isinstance(value, Tensor) and value.shape == shape else value
                for name, value in changed[i].items()
            }
        return {**state, "state": changed}


def _parameter_indices(optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Parameters by the numbers that an optimizer's state has them under."""
    return enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])


def make_rank_groups(ep_size: int | None, timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """This rank's P neighbours that share the experts, and the ranks that hold its own, None where no others do.

    Groups apart from DDP's, so that its reductions and the rows never wait for each other. A collective.

    Args:
        ep_size: P; None: all ranks.
        timeout: of their collectives.

    Raises:
        ValueError: P does not divide W.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    size = ep_size or world
    if world % size:
        raise ValueError(f"strategy: ep_size must divide the number of ranks, got ep_size={size}, ranks={world}")
    sharing = [list(range(first, first + size)) for first in range(0, world, size)]
    replicas = [list(range(first, world, size)) for first in range(size)] if size < world else []
    # Every rank must take part in the making of every group.
    groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in (*sharing, *replicas)]
    own = [group for ranks, group in groups if rank in ranks]
    return own[0], own[1] if replicas else None
