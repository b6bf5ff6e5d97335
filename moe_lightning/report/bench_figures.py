"""Sections of benchmark records, one for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_lightning.report.bench_ep import ep_figures, link_figures, scale_figures
from moe_lightning.report.bench_layer import kernel_figures, layer_figures
from moe_lightning.report.bench_router import router_figures
from moe_lightning.report.figures import Figure, Section
from moe_lightning.report.read_bench import Record

_KINDS: dict[str, tuple[str, Callable[[Sequence[Record]], list[Figure]]]] = {
    "router": ("Benchmark: routing", router_figures),
    "layer": ("Benchmark: the MoE layer", layer_figures),
    "ep": ("Benchmark: across GPUs", ep_figures),
    "link": ("Benchmark: what joins the GPUs", link_figures),
    "scale": ("Model: more ranks", scale_figures),
    "kernels": ("Benchmark: kernels", kernel_figures),
}


def bench_sections(records: Sequence[Record]) -> tuple[int, list[Section], list[str]]:
    """How many records can be drawn, and where: in the order above, whatever order they were given in.

    A record that lacks what is drawn, or holds something else there, is left out for a line.
    """
    drawn, sections, problems = 0, [], []
    for kind, (title, figures) in _KINDS.items():
        whole = []
        for record in (record for record in records if record.name == kind):
            try:
                figures([record])
                whole.append(record)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
                problems.append(
                    f"report: a record of bench {kind} must hold what this version writes, got {record.source.name} "
                    f"({' '.join(repr(error).split())[:150]}); measure again"
                )
        if whole:
            sections.append(Section(title, figures(whole)))
            drawn += len(whole)
    return drawn, sections, problems
