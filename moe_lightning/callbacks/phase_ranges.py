"""The phases of MoE layers as named ranges of torch.profiler: moe/L3/select, moe/L3/select/backward."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.profiler import record_function

from moe_lightning.layers import Phase

#: A range is named by the call that the phase is.
RANGES = {
    Phase.LOGIT: "gate",
    Phase.SELECT: "select",
    Phase.INDEX: "plan",
    Phase.PERMUTE: "dispatch",
    Phase.EXPERTS: "experts",
    Phase.UNPACK: "combine",
}
#: In the order of time. In backward, dispatch holds plan: no gradient passes between them.
FORWARD = tuple(RANGES.values())
BACKWARD = tuple(name for name in reversed(FORWARD) if name != "plan")


class LayerRanges:
    """The `Mark` of one layer: a range is open from a phase's mark to the next, forward and backward.

    A range of the backward pass begins and ends where a gradient arrives, inside what autograd itself records of the
    node that takes it: `nesting` puts that right in a written trace.

    Args:
        layer: its number, which the ranges are named by.
    """

    def __init__(self, layer: int) -> None:
        self._names = {phase: f"moe/L{layer}/{name}" for phase, name in RANGES.items()}
        self._forward: record_function | None = None
        self._backward: record_function | None = None
        self._phases: list[Phase] = []

    def __call__(self, phase: Phase, tensor: Tensor | None = None) -> None:
        """See `moe_lightning.layers.phases.Mark`."""
        self._forward = _next(self._forward, self._names.get(phase))
        if phase is Phase.LOGIT:
            self._phases = []
        if tensor is not None and tensor.requires_grad:
            # A phase whose end no gradient will tell of is not begun.
            begun = self._names[Phase(phase - 1)] + "/backward" if self._phases else None
            self._phases.append(phase)
            tensor.register_hook(partial(self._gradient_arrived, begun))

    def _gradient_arrived(self, begun: str | None, gradient: Tensor) -> None:
        self._backward = _next(self._backward, begun)

    def close(self) -> None:
        """End what is open, as when a pass breaks off."""
        self._forward, self._backward = _next(self._forward, None), _next(self._backward, None)


def _next(open_range: record_function | None, name: str | None) -> record_function | None:
    """End one range and begin the next."""
    if open_range is not None:
        open_range.__exit__(None, None, None)
    if name is None:
        return None
    begun = record_function(name)
    begun.__enter__()
    return begun
