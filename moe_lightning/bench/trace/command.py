"""A trace in figures: time of every phase, communication, computation, and how much of the former the latter hides.

    python -m moe_lightning.bench trace log/moe_trace/rank0.*.pt.trace.json.gz

docs/profiling.md says what the columns mean.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moe_lightning.bench.flags import Parser
from moe_lightning.bench.trace.intervals import length
from moe_lightning.bench.trace.overlap import Overlap, by_phase, of_layers, of_trace
from moe_lightning.bench.trace.reading import Range, TraceFile, read


def main(arguments: list[str]) -> None:
    """Parse flags, read, print a table a file."""
    parser = Parser("trace", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="written by --trace or the Trace callback")
    console = Console(width=120)
    for path in parser.parse_args(arguments).files:
        trace = read(path)
        console.print(path, soft_wrap=True)
        console.print(table(trace))
        console.print(comment(trace))


def table(trace: TraceFile) -> Table:
    """Milliseconds a step, of all layers together."""
    steps = max(trace.steps, 1)
    layers = len({found.layer for found in trace.ranges})
    title = f"{trace.steps} step{'s' if trace.steps != 1 else ''}, {layers} MoE layer{'s' if layers != 1 else ''}"
    found = Table(title=f"{title}; ms a step", title_justify="left")
    found.add_column("phase", no_wrap=True)
    for column in ("ranges", "host", "comm", "comp", "overlap", "eta_trace"):
        found.add_column(column, justify="right", no_wrap=True)

    def add(name: str, ranges: list[Range] | None, overlap: Overlap) -> None:
        own = ("", "") if ranges is None else (str(len(ranges)), ms(sum(r.interval[1] - r.interval[0] for r in ranges)))
        eta = "-" if overlap.eta_trace is None else f"{overlap.eta_trace:.2f}"
        found.add_row(name, *own, ms(overlap.comm_us), ms(overlap.comp_us), ms(overlap.overlap_us), eta)

    def ms(us: float) -> str:
        return f"{1e-3 * us / steps:,.3f}"

    for phase, overlap in by_phase(trace).items():
        add(phase, [r for r in trace.ranges if r.phase == phase], overlap)
    found.add_section()
    add("MoE layers", trace.ranges, of_layers(trace))
    add("all of the trace", None, of_trace(trace))
    return found


def comment(trace: TraceFile) -> str:
    """What comm and comp are here."""
    if not trace.on_gpu and not length(trace.whole.comm):
        return "no kernels and no gloo work in this trace: nothing is communicated, eta_trace is not defined"
    if not trace.on_gpu:
        return "no kernels in this trace: comm is gloo's work on its own threads, comp the ops of tensors"
    if not length(trace.whole.comm):
        return "no NCCL kernels in this trace: nothing is communicated by exchanges, eta_trace is not defined"
    return "comm: NCCL kernels, comp: all other kernels"
