"""The phases of an MoE layer, and the hook that is called as one begins.

    x_TD -> T_logit -> T_select -> T_index -> T_permute -> T_experts -> T_unpack -> y_TD

Autograd runs the nodes of the phases in reverse order (highest sequence number first), so the same hook, called when
the gradient of its tensor arrives, bounds the phases of the backward pass too. No gradient passes between T_index and
T_permute: backward has their sum, T_pack.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Phase(IntEnum):
    """A phase begins at its own hook call and ends at the next; DONE closes the last.

    A member has the name of its `time`, in tables and tags, and of its `range`, in traces.
    """

    LOGIT = 0, "T_logit", "gate"
    SELECT = 1, "T_select", "select"
    INDEX = 2, "T_index", "plan"
    PERMUTE = 3, "T_permute", "dispatch"
    EXPERTS = 4, "T_experts", "experts"
    UNPACK = 5, "T_unpack", "combine"
    DONE = 6, "", ""

    time: str
    range: str

    def __new__(cls, number: int, time: str, range: str) -> Phase:
        """A row of the table above."""
        phase = int.__new__(cls, number)
        phase._value_, phase.time, phase.range = number, time, range
        return phase


#: Those that take time, in their order.
PHASES: tuple[Phase, ...] = tuple(phase for phase in Phase if phase is not Phase.DONE)
#: The phases that a named time is the sum of: T_pack = T_index + T_permute, T_route = T_logit + T_select + T_pack.
TIMES: dict[str, tuple[Phase, ...]] = {
    **{phase.time: (phase,) for phase in PHASES[:4]},
    "T_pack": (Phase.INDEX, Phase.PERMUTE),
    "T_route": PHASES[:4],
    **{phase.time: (phase,) for phase in PHASES[4:]},
}
#: Times that backward has in sum only, as T_pack.
FORWARD_ONLY = (Phase.INDEX.time, Phase.PERMUTE.time)


class Hook(Protocol):
    """Called once per forward pass for each phase.

    Args:
        phase: the phase that begins.
        tensor: its gradient ends the phase in backward.
        step: what the phase calls; None for DONE, and where the phase is more than one call.
    """

    def __call__(self, phase: Phase, tensor: Tensor | None = None, step: Step | None = None, /) -> None: ...  # noqa: D102


class Step(NamedTuple):
    """One phase as a call: ``call(*inputs)``."""

    phase: Phase
    call: Callable[..., Any]
    """A module, or the method of a module or dispatcher."""
    inputs: tuple[Any, ...]

    @property
    def module(self) -> nn.Module | None:
        """The module whose weights the call may read."""
        owner = getattr(self.call, "__self__", self.call)
        return owner if isinstance(owner, nn.Module) else None

    def call_with(self, module: nn.Module, *inputs: Any) -> Any:
        """The same call on another module and other inputs."""
        return (module if self.call is self.module else getattr(module, self.call.__name__))(*inputs)


def no_hook(phase: Phase, tensor: Tensor | None = None, step: Step | None = None) -> None:
    """Nothing is timed."""


def run_step(hook: Hook, phase: Phase, tensor: Tensor | None, call: Callable[..., Any], *inputs: Any) -> Any:
    """``call(*inputs)``, announced to the hook."""
    if hook is not no_hook:
        hook(phase, tensor, Step(phase, call, inputs))
    return call(*inputs)


class StepRecorder(dict[Phase, Step]):
    """A hook that keeps each phase's call and inputs."""

    def __call__(self, phase: Phase, tensor: Tensor | None = None, step: Step | None = None) -> None:
        """See `Hook`."""
        if step is not None:
            self[phase] = step


class Hooks:
    """Several hooks in one, called in the order in which they were added."""

    def __init__(self, *hooks: Hook) -> None:
        self.hooks = hooks

    def __call__(self, phase: Phase, tensor: Tensor | None = None, step: Step | None = None) -> None:
        """See `Hook`."""
        for hook in self.hooks:
            hook(phase, tensor, step)


def with_hook(current: Hook, hook: Hook) -> Hook:
    """A hook that also calls `hook`; once, however often it is added."""
    return _joined(*hook_parts(without_hook(current, hook)), hook)


def without_hook(current: Hook, hook: Hook) -> Hook:
    """The same without `hook`; `no_hook` when none is left."""
    return _joined(*(other for other in hook_parts(current) if other is not hook))


def hook_parts(hook: Hook) -> tuple[Hook, ...]:
    """The hooks that one is made of."""
    if hook is no_hook:
        return ()
    return hook.hooks if isinstance(hook, Hooks) else (hook,)


def _joined(*hooks: Hook) -> Hook:
    if not hooks:
        return no_hook
    return hooks[0] if len(hooks) == 1 else Hooks(*hooks)
