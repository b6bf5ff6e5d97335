"""The weights of one layer's experts, cut into groups of neighbours that are computed one after the other.

Legend: E experts, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops.table import assemble


class GradientMemory:
    """One tensor for the gradients of all groups of a weight, so that no copy brings them together.

    It does not hold the weight: autograd keeps this to the end of the backward pass.
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        self._shape, self._dtype, self._device = weight.shape, weight.dtype, weight.device
        self._groups = groups
        self._free: dict[int, Tensor] = {}
        self._whole: Tensor | None = None

    def take(self, group: int) -> Tensor | None:
        """Like the weights of the group; None where it was taken before: what is there is not to be overwritten."""
        if self._whole is None:
            self._whole = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._free = dict(enumerate(self._whole.chunk(self._groups)))
        return self._free.pop(group, None)

    def join(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the whole weight: this memory, where all gradients are in it."""
        self._whole = None
        return assemble(gradients, self._shape[0])


@dataclass(frozen=True)
class GroupGradients:
    """Where the gradients of one group's weights go."""

    up: GradientMemory
    down: GradientMemory
    number: int

    def __call__(self, needs_up: bool, needs_down: bool) -> tuple[Tensor | None, Tensor | None]:
        """For up and down; None for new tensors."""
        return self.up.take(self.number) if needs_up else None, self.down.take(self.number) if needs_down else None


class Group(NamedTuple):
    """Weights of some experts."""

    up: Tensor
    down: Tensor
    gradients: GroupGradients | None = None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: int, memory: GradientMemory) -> tuple[Tensor, ...]:
        ctx.memory = memory
        return weight.chunk(groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.memory.join(gradients), None, None


def cut(up: Tensor, down: Tensor, groups: int, parts: int) -> tuple[Group, ...]:
    """Stacked weights (E, ...) in G groups, which so many parts of the rows are for; E is a multiple of G."""
    if groups == 1:
        return (Group(up, down),)
    if parts != groups:  # gradients of a group are added up, elsewhere
        return tuple(Group(u, d) for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True))
    memories = GradientMemory(up, groups), GradientMemory(down, groups)
    ups, downs = (_Cut.apply(weight, groups, memory) for weight, memory in zip((up, down), memories, strict=True))
    pairs = zip(ups, downs, strict=True)
    return tuple(Group(u, d, GroupGradients(*memories, number)) for number, (u, d) in enumerate(pairs))
