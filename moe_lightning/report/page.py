"""The page as HTML text: figures poured into the templates."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_lightning.report.bench_figures import bench_sections
from moe_lightning.report.read_bench import Record
from moe_lightning.report.read_run import Run
from moe_lightning.report.run_figures import run_sections
from moe_lightning.report.scales import TIMES
from moe_lightning.report.source import origins
from moe_lightning.report.summary import HEADS, headline, keys, table


def page(runs: Sequence[Run], records: Sequence[Record]) -> str:
    """One self-contained document; text of runs and records is escaped, and no script but the page's own may run."""
    environment = Environment(
        loader=PackageLoader("moe_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render()
    title, facts = headline(runs, len(records))
    return environment.get_template("page.html").render(
        title=title,
        facts=facts,
        run_origins=origins([run.source for run in runs]),
        times=TIMES,
        keys=keys(runs) if len(runs) > 1 else [],
        heads=HEADS,
        rows=table(runs),
        sections=[*run_sections(runs), *bench_sections(records)],
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
