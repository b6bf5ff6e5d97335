"""The torch operator library that the native kernels are registered in.

``Library.define`` and ``impl``, not ``torch.library.custom_op``: the latter costs 13-21 us of host time a
call, several times the kernels themselves. Where nothing traces or intercepts the call (`is_plain`), even the
dispatcher is left out: it takes longer than the kernels too. Also what several ops share: a check and a dtype.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("moe_lightning", "DEF")

# Looked up once: a chain of attributes costs as much as the question.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def register(
    schema: str,
    call: Callable[..., Any],
    fake: Callable[..., Any],
    cuda_call: Callable[..., Any] | None = None,
) -> Any:
    """Define an op and return its overload: `fake` gives the outputs' shapes, `cuda_call` defaults to `call`."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, call, "CPU")
    _LIBRARY.impl(name, cuda_call or call, "CUDA")
    torch.library.register_fake(f"moe_lightning::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.moe_lightning, name).default


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor may be called directly: no compiler, no dispatch mode, no subclass, no functorch."""
    return not _is_compiling() and type(tensor) in _PLAIN_TYPES and not _dispatch_modes() and _functorch_level() is None


def check_same_device(component: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError, naming each tensor's device, unless all that are given are on one."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{component}: tensors must be on one device, got {got}; move them with .to(device)")


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, weights and probabilities of numbers of `dtype` are computed in: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
