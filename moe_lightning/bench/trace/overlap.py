"""How much of the communication in a trace runs beside computation: eta_trace = |comm ∩ comp| / |comm|."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.bench.trace.intervals import intersection, length
from moe_lightning.bench.trace.reading import TraceFile, Work


@dataclass(frozen=True)
class Overlap:
    """Microseconds."""

    comm_us: float
    comp_us: float
    overlap_us: float
    """Of the communication, beside any computation of the rank."""

    @property
    def eta_trace(self) -> float | None:
        """0: the rank waits for all of it; 1: all is hidden. None where nothing is communicated."""
        return self.overlap_us / self.comm_us if self.comm_us else None

    def __add__(self, other: Overlap) -> Overlap:
        """Of two ranks, or of two phases."""
        sums = self.comm_us + other.comm_us, self.comp_us + other.comp_us, self.overlap_us + other.overlap_us
        return Overlap(*sums)


def of(work: Work, whole: Work) -> Overlap:
    """A part's communication against the computation of the whole."""
    return Overlap(length(work.comm), length(work.comp), length(intersection(work.comm, whole.comp)))


def by_phase(trace: TraceFile) -> dict[str, Overlap]:
    """In the order of time."""
    return {phase: of(work, trace.whole) for phase, work in trace.phases.items()}


def of_layers(trace: TraceFile) -> Overlap:
    """All phases together: what the rest of a step communicates is not in it."""
    return sum(by_phase(trace).values(), Overlap(0.0, 0.0, 0.0))


def of_trace(trace: TraceFile) -> Overlap:
    """Everything, averaging of gradients and all."""
    return of(trace.whole, trace.whole)
