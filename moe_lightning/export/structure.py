"""What decides a module's graph."""

from __future__ import annotations

from typing import Any

from torch import nn


def structure(module: nn.Module) -> list[Any]:
    """All of a module but its tensors' values: modules of equal structure have the same graph."""
    return [_facts(part) for part in module.modules()]


def _facts(module: nn.Module) -> tuple[Any, ...]:
    plain = {name: v for name, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None), tuple))}
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return type(module), plain, [(name, tensor.shape, tensor.dtype) for name, tensor in tensors]
