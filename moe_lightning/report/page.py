"""The page as HTML text: sections of runs and of benchmark records poured into the templates."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_lightning.callbacks.expert_load import LOAD_CAP
from moe_lightning.report.bench_ep_figures import ep_figures, link_figures, scale_figures
from moe_lightning.report.bench_records import Record, kernel_figures, layer_figures, router_figures
from moe_lightning.report.compare import compare
from moe_lightning.report.figures import TIMES, Figure, Section, provenances
from moe_lightning.report.read_run import Run
from moe_lightning.report.run_figures import run_sections
from moe_lightning.report.summary import headline, table


def page(runs: Sequence[Run], sections: Sequence[Section], records: int, problems: Sequence[str]) -> str:
    """One self-contained document; text of runs and records is escaped, and no script but the page's own may run.

    Args:
        runs: a row of the table each, and figures.
        sections: of benchmark records.
        records: how many.
        problems: what could not be read, a line each.
    """
    environment = Environment(
        loader=PackageLoader("moe_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render(cap=LOAD_CAP)
    title, facts = headline(runs, records)
    comparison = compare(runs)
    return environment.get_template("page.html").render(
        title=title,
        facts=facts,
        run_provenances=provenances([run.source for run in runs]),
        times=TIMES,
        cap=LOAD_CAP,
        differences=comparison.differences,
        problems=problems,
        table=table(runs, comparison),
        sections=[*run_sections(runs, comparison), *sections],
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


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
        readable = []
        for record in (record for record in records if record.name == kind):
            try:
                figures([record])
                readable.append(record)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
                problems.append(
                    f"report: a record of bench {kind} must hold what this version writes, got {record.source.name} "
                    f"({' '.join(repr(error).split())[:150]}); measure again"
                )
        if readable:
            sections.append(Section(title, figures(readable)))
            drawn += len(readable)
    return drawn, sections, problems
