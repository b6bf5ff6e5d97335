"""Weights in the dtype of matrix products, cast once per optimizer step in place of once per micro-batch.

Autocast casts a weight at each use. A module that reads its weights through `product_weight` takes a copy instead where
there is one; the gradient goes to the weight itself, and is what autocast would give, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class _Copied(torch.autograd.Function):
    """A weight, whose value is that of its copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class HasProductWeights(nn.Module):
    """A module whose parameters are factors of matrix products.

    `weight_copies` has some of them by name, in another dtype; empty outside `LowPrecisionWeights.used`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_copies: dict[str, Tensor] = {}

    def product_weight(self, name: str) -> Tensor:
        """A weight, or its copy; under autocast alone, whose products would cast it."""
        weight = getattr(self, name)
        copy = self.weight_copies.get(name)
        if copy is None or not torch.is_autocast_enabled(weight.device.type):
            return weight
        return _Copied.apply(weight, copy)


class Linear(HasProductWeights, nn.Linear):
    """`torch.nn.Linear`, its weight read as a factor of a product."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.product_weight("weight"), self.bias)


class LowPrecisionWeights:
    """Copies of all factors of products in a network.

    Args:
        network: whose modules are `HasProductWeights`.
        dtype: of the copies.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._copies: list[tuple[HasProductWeights, dict[str, Tensor]]] = []
        self._weights: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, HasProductWeights):
                weights = dict(module.named_parameters(recurse=False))
                self._weights += weights.values()
                self._copies.append((module, {n: torch.empty_like(w, dtype=dtype) for n, w in weights.items()}))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights' values, as an optimizer step has left them."""
        copies = [copy for _, of_module in self._copies for copy in of_module.values()]
        if copies:  # a network may have no such module
            torch._foreach_copy_(copies, self._weights)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Modules read the copies meanwhile."""
        for module, copies in self._copies:
            module.weight_copies = copies
        try:
            yield
        finally:
            for module, _ in self._copies:
                module.weight_copies = {}
