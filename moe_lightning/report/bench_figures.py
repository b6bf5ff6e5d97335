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
    """In the order above, whatever order they were given in."""
    return [
        Section(title, figures([record for record in records if record.name == kind]))
        for kind, (title, figures) in _KINDS.items()
        if any(record.name == kind for record in records)
    ]
