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


def bench_sections(records: Sequence[Record]) -> list[Section]:
    """In the order above, whatever order they were given in; ValueError for one that lacks what is drawn."""
    sections = []
    for kind, (title, figures) in _KINDS.items():
        if own := [record for record in records if record.name == kind]:
            try:
                sections.append(Section(title, figures(own)))
            except (KeyError, TypeError, IndexError) as error:
                names = ", ".join(record.source.name for record in own)
                raise ValueError(
                    f"report: a record of bench {kind} must hold what this version writes, got {names} ({error!r}); "
                    "measure again"
                ) from error
    return sections
