"""The phases of an MoE layer and the marks between them.

    x_TD -> T_logit -> T_select -> T_index -> T_permute -> T_experts -> T_unpack -> y_TD

A mark stands where one phase ends and the next begins. Autograd runs the nodes of the phases in reverse order
(highest sequence number first), so the same marks, hit when the gradient of the marked tensor arrives, bound the
phases of the backward pass too. No gradient passes between T_index and T_permute: backward has their sum, T_pack.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from torch import Tensor


class Phase(IntEnum):
    """A phase begins at its own mark and ends at the next one; DONE closes the last."""

    LOGIT = 0
    SELECT = 1
    INDEX = 2
    PERMUTE = 3
    EXPERTS = 4
    UNPACK = 5
    DONE = 6


class Mark(Protocol):
    """Called once a forward pass for each phase, with the tensor whose gradient ends it in backward."""

    def __call__(self, phase: Phase, tensor: Tensor | None = None) -> None:
        """Take the time now, and again when the gradient of `tensor` arrives."""


def no_mark(phase: Phase, tensor: Tensor | None = None) -> None:
    """Timing is off: a call to an empty function is all it costs."""
