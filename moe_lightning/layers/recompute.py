"""Activation checkpointing: what a part would keep for backward is computed again there (arXiv:1604.06174).

Routing is decided once. Where a router is part of what is repeated, the second pass gets the first one's selection: two
passes need not agree on experts whose scores are close, and the gradients would be of other experts than the loss. What
`Router.select` keeps for its own gradient, (T, K) in ours, stays from the first pass.

Legend: T tokens, K top_k.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moe_lightning.ops import Selection

#: What of a decoder is computed again: nothing; dispatch, experts and combine of each MoE layer; each whole block.
Recompute = Literal["none", "moe", "block"]


def recompute(call: Callable[..., Any], *inputs: Any, preserve_rng_state: bool = False) -> Any:
    """``call(*inputs)``, of which the inputs are kept for backward, which makes a second pass.

    Args:
        call: draws no random numbers, unless their state is preserved.
        inputs: tensors, or None.
        preserve_rng_state: draw the same random numbers in both passes. The host sets the state of a GPU's generator,
            which a CUDA graph cannot hold.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return call(*inputs)
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state, context_fn=_two_passes)


def select_once(select: Callable[[], Selection]) -> Selection:
    """``select()``; in a second pass, what that gave in the first."""
    return select() if _current.run is None else _current.run.select(select)


def in_backward() -> bool:
    """Whether autograd is at work on this thread: a forward pass seen now is one that it repeats."""
    return torch._C._current_graph_task_id() != -1


class _Pass:
    """The first pass, or the second one, which may be made more than once: a context.

    Args:
        kept: the selections of both, in their order.
        repeated: whether it is the second.
    """

    def __init__(self, kept: list[Selection], repeated: bool) -> None:
        self._kept, self._repeated = kept, repeated

    def __enter__(self) -> Self:
        self._given: Iterator[Selection] = iter(self._kept)
        self._outer, _current.run = _current.run, self
        return self

    def __exit__(self, *_: object) -> None:
        _current.run = self._outer

    def select(self, select: Callable[[], Selection]) -> Selection:
        """See `select_once`."""
        if self._repeated:
            return next(self._given)
        with saved_tensors_hooks(Tensor.detach, _unchanged):  # kept, in place of the hooks of torch's checkpoint
            selection = select()
        # Without its graph, which holds this pass; with a gradient, for the second pass must save what the first did.
        weights_TK = selection.weights_TK.detach().requires_grad_(selection.weights_TK.requires_grad)
        self._kept.append(selection._replace(weights_TK=weights_TK))
        return selection


class _Current(threading.local):
    """The pass of this thread: autograd has its own for each device."""

    run: _Pass | None = None


_current = _Current()


def _two_passes() -> tuple[_Pass, _Pass]:
    kept: list[Selection] = []
    return _Pass(kept, repeated=False), _Pass(kept, repeated=True)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
