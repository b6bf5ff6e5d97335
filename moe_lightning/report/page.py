"""The page as HTML text: figures poured into the templates."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_lightning.callbacks.heat_map import LOAD_CAP
from moe_lightning.report.compare import compare
from moe_lightning.report.figures import Section
from moe_lightning.report.read_run import Run
from moe_lightning.report.run_figures import run_sections
from moe_lightning.report.scales import TIMES
from moe_lightning.report.source import origins
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
        run_origins=origins([run.source for run in runs]),
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
