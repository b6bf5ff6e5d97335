"""Flags of `python -m moe_lightning.report`, and the file it writes."""

from __future__ import annotations

from pathlib import Path

from rich.progress import track

from moe_lightning.arguments import Parser
from moe_lightning.files import write_whole
from moe_lightning.report.page import page
from moe_lightning.report.read_bench import read_record
from moe_lightning.report.read_run import read_run, run_folders, told_apart


def parser() -> Parser:
    """Runs, records, and where the page goes."""
    parser = Parser("report", "Write runs and benchmark records as one HTML page that needs nothing beside it.")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="a folder with event files, or one above")
    parser.add_argument(
        "--bench", type=Path, nargs="+", default=[], metavar="FILE", help="records of moe_lightning.bench"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, report.html")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read, draw and write; ValueError for what a user can mend."""
    flags = parser().parse_args(argv)
    if not flags.runs and not flags.bench:
        raise ValueError("report: there must be something to show, got no RUN and no --bench; name one")
    records = [read_record(path) for path in flags.bench]
    folders = run_folders(flags.runs)
    runs = told_apart([read_run(folder) for folder in track(folders, "reading runs", transient=True)])
    _write(flags.out, page(runs, records))
    print(f"{flags.out}  {flags.out.stat().st_size / 1e3:,.0f} KB, runs: {len(runs)}, records: {len(records)}")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise ValueError(f"report: --out must be a writable file, got {path} ({error.strerror})") from error
