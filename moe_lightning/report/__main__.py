"""`python -m moe_lightning.report RUN [RUN ...] [--bench FILE ...] --out report.html`: flags and file."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.progress import track

from moe_lightning.report.bench_records import read_record
from moe_lightning.report.figures import printable
from moe_lightning.report.page import bench_sections, page
from moe_lightning.report.read_run import disambiguate, read_run, run_folders
from moe_lightning.utils.cli import Parser
from moe_lightning.utils.errors import plain_errors
from moe_lightning.utils.files import atomic_write


def parser() -> Parser:
    """Runs, records, and where the page goes."""
    parser = Parser("report", "Write runs and benchmark records as one HTML page that needs no other file.")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="a folder with event files, or one above")
    parser.add_argument(
        "--bench", type=Path, nargs="+", default=[], metavar="FILE", help="records of moe_lightning.bench"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, report.html")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read, draw and write. What cannot be read is a warning, and a line on the page; ValueError where nothing can."""
    flags = parser().parse_args(argv)
    if not flags.runs and not flags.bench:
        raise ValueError("report: there must be something to show, got no RUN and no --bench; name one")
    folders, problems = run_folders(flags.runs)
    runs = []
    for folder in track(folders, "reading runs", transient=True):
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            problems.append(str(error))
    records = []
    for path in flags.bench:
        try:
            records.append(read_record(path))
        except ValueError as error:
            problems.append(str(error))
    problems += [problem for run in runs for problem in run.problems]
    drawn, sections, not_drawn = bench_sections(records)
    problems += not_drawn
    if not runs and not drawn:
        raise ValueError(problems[0])
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    _write(flags.out, page(disambiguate(runs), sections, drawn, problems))
    size = flags.out.stat().st_size / 1e3
    print(f"{printable(flags.out)}  {size:,.0f} KB, runs: {len(runs)}, records: {drawn}")


def _write(path: Path, text: str) -> None:
    try:
        atomic_write(path, text)
    except OSError as error:
        raise ValueError(
            f"report: --out must be a writable file, got {printable(path)} ({error.strerror}); name another"
        ) from error


if __name__ == "__main__":
    with plain_errors():
        main()
