"""What is timed: calls without arguments, on inputs that they share with others or on copies of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]
#: Makes a call: on the inputs it shares with others (False), or on its own copy of them (True).
CallFactory = Callable[[bool], Call]


def forward_factory(call: Callable[..., Any], inputs: tuple[Any, ...]) -> CallFactory:
    """Of any call."""

    def make(copied: bool) -> Call:
        own = leaves(inputs, copied)
        return lambda: call(*own)

    return make


def backward_factory(
    call: Callable[..., Any],
    inputs: tuple[Any, ...],
    generator: torch.Generator,
    strides: tuple[int, ...] | None = None,
) -> CallFactory:
    """The backward pass of any call, to all inputs that want a gradient.

    `strides` are those of the gradient that the call's only output gets; by default the output's own.
    """

    def make(copied: bool) -> Call:
        own = leaves(inputs, copied)
        outputs, targets = differentiable(call(*own)), differentiable(own)
        if strides is None:
            upstream = [torch.empty_like(output) for output in outputs]
        else:
            [output] = outputs
            upstream = [torch.empty_strided(output.shape, strides, dtype=output.dtype, device=output.device)]
        for gradient in upstream:
            gradient.normal_(generator=generator)
        return lambda: torch.autograd.grad(outputs, targets, upstream, retain_graph=True, allow_unused=True)

    return make


def leaves(value: Any, copied: bool) -> Any:
    """The same structure, its tensors cut from their graphs, in memory of their own if `copied`."""
    if isinstance(value, Tensor):
        leaf = value.detach()
        return (_clone(leaf) if copied else leaf).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value) if copied else value
    if isinstance(value, tuple):
        parts = [leaves(part, copied) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: leaves(part, copied) for name, part in vars(value).items()})
    return value


def _clone(tensor: Tensor) -> Tensor:
    """A copy that stays a broadcast view where the tensor is one."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor[once].clone().expand_as(tensor)


def differentiable(value: Any) -> list[Tensor]:
    """All tensors in the structure that carry a gradient."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, nn.Module):
        return [parameter for parameter in value.parameters() if parameter.requires_grad]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in differentiable(part)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return differentiable(tuple(vars(value).values()))
    return []
