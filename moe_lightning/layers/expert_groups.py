"""The weights of one layer's experts, cut into groups of neighbours that are computed one after the other.

Legend: E experts, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientMemory:
    """One tensor for the gradients of all groups of a weight, so that no copy brings them together."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._free: dict[int, Tensor] = {}
        self._whole: Tensor | None = None

    def take(self, group: int, weight: Tensor) -> Tensor | None:
        """Like the weight of the group; None where it was taken before: what is there is not to be overwritten."""
        if self._whole is None:
            self._whole = weight.new_empty(self._groups * weight.shape[0], *weight.shape[1:])
            self._free = dict(enumerate(self._whole.chunk(self._groups)))
        return self._free.pop(group, None)

    def join(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the whole weight: this memory, where all gradients are in it."""
        whole, self._whole = self._whole, None
        if whole is not None and len(gradients) == self._groups:
            begins = [part.data_ptr() for part in whole.chunk(self._groups)]
            if begins == [gradient.data_ptr() for gradient in gradients]:
                return whole
        return torch.cat(gradients)


class Group(NamedTuple):
    """Weights of some experts, and where their gradients go."""

    up: Tensor
    down: Tensor
    number: int = 0
    memories: tuple[GradientMemory, GradientMemory] | None = None

    def gradient_memory(self, needs_up: bool, needs_down: bool) -> tuple[Tensor | None, Tensor | None]:
        """For the gradients of up and down; None for new tensors."""
        if self.memories is None:
            return None, None
        up, down = self.memories
        return (
            up.take(self.number, self.up) if needs_up else None,
            down.take(self.number, self.down) if needs_down else None,
        )


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: int, memory: GradientMemory) -> tuple[Tensor, ...]:
        ctx.memory = memory
        return weight.chunk(groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.memory.join(gradients), None, None


def cut(up: Tensor, down: Tensor, groups: int) -> tuple[Group, ...]:
    """Stacked weights (E, ...) in G groups; E is a multiple of G."""
    if groups == 1:
        return (Group(up, down),)
    memories = GradientMemory(groups), GradientMemory(groups)
    ups, downs = (_Cut.apply(weight, groups, memory) for weight, memory in zip((up, down), memories, strict=True))
    return tuple(Group(u, d, i, memories) for i, (u, d) in enumerate(zip(ups, downs, strict=True)))
