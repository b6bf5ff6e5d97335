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


class Marks:
    """Several timers on one seat, called in the order in which they came."""

    def __init__(self, *marks: Mark) -> None:
        self.marks = marks

    def __call__(self, phase: Phase, tensor: Tensor | None = None) -> None:
        """See `Mark`."""
        for mark in self.marks:
            mark(phase, tensor)


def with_mark(seat: Mark, mark: Mark) -> Mark:
    """What to put on a seat so that `mark` is called too; once, however often it is added."""
    return _on_a_seat(*_marks(without_mark(seat, mark)), mark)


def without_mark(seat: Mark, mark: Mark) -> Mark:
    """The same without it; `no_mark` when nobody is left."""
    return _on_a_seat(*(other for other in _marks(seat) if other is not mark))


def _marks(seat: Mark) -> tuple[Mark, ...]:
    if seat is no_mark:
        return ()
    return seat.marks if isinstance(seat, Marks) else (seat,)


def _on_a_seat(*marks: Mark) -> Mark:
    if not marks:
        return no_mark
    return marks[0] if len(marks) == 1 else Marks(*marks)
