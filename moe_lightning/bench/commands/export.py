"""The ONNX forms of an MoE layer: size of the graph, time to export, time of a run in onnxruntime.

The decoder_moe of the README's export section, unless flags say otherwise. Times are medians of CPU time, which other
work on the machine changes little: an export's with its check in onnxruntime, a run's on one thread. Exports, and later
runs, are interleaved.
"""

from __future__ import annotations

import argparse
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_lightning.bench.cli import Parser
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import Spread, print_noise, with_spread
from moe_lightning.export import export_onnx
from moe_lightning.export.agreement import open_session, random_input
from moe_lightning.export.directory import MODEL_FILE
from moe_lightning.export.moe_forms import MOE_FORMS
from moe_lightning.export.sources import SIZES, fresh_model
from moe_lightning.utils.checks import check_sizes

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def measure(flags: argparse.Namespace, progress: Progress, root: Path) -> list[dict[str, Any]]:
    """A row per form; the model files are written under `root`."""
    model = fresh_model("decoder_moe", {name: getattr(flags, name) for name in SIZES["decoder_moe"]}, flags.router)
    exports: dict[str, list[float]] = {form: [] for form in MOE_FORMS}
    runs: dict[str, list[float]] = {form: [] for form in MOE_FORMS}
    differences = {}
    task = progress.add_task("exporting", total=flags.exports * len(MOE_FORMS))
    for _ in range(flags.exports):
        for form in MOE_FORMS:
            began = time.process_time()
            done = export_onnx(model, root / form, batch=flags.batch, seq_len=flags.seq_len, moe_form=form)
            exports[form].append(time.process_time() - began)
            differences[form] = done.largest_difference
            progress.advance(task)
    tokens = random_input(model, (flags.batch, flags.seq_len), torch.Generator().manual_seed(0)).numpy()
    sessions = {form: open_session(root / form, threads=1) for form in MOE_FORMS}
    task = progress.add_task("running", total=flags.rounds)
    for _ in range(flags.rounds):
        for form, session in sessions.items():
            began = time.thread_time()
            session.run(None, {"tokens": tokens})
            runs[form].append(time.thread_time() - began)
        progress.advance(task)
    rows = []
    for form in MOE_FORMS:
        spread = {"export_s": Spread.of(exports[form]), "run_ms": Spread.of(runs[form]).scaled(1e3)}
        written = onnx.load(root / form / MODEL_FILE, load_external_data=False)
        rows.append(
            {
                "form": form,
                "nodes": len(written.graph.node),
                "nodes_in_functions": sum(len(function.node) for function in written.functions),
                "graph_kb": round((root / form / MODEL_FILE).stat().st_size / 1e3, 1),
                "export_s": round(spread["export_s"].median, 1),
                "run_ms": round(spread["run_ms"].median, 1),
                "largest_difference": differences[form],
                "spread": spread,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("--onnx_moe")
    for column in ("nodes", "within", "graph KB", "export s", "run ms", "difference"):
        table.add_column(column, justify="right")
    for row in rows:
        counts = (str(row[key]) for key in ("form", "nodes", "nodes_in_functions", "graph_kb"))
        times = (with_spread(str(row[key]), row["spread"][key]) for key in ("export_s", "run_ms"))
        table.add_row(*counts, *times, f"{row['largest_difference']:.1e}")
    return table


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record."""
    parser = Parser("export", __doc__)
    for name, default in SIZES["decoder_moe"].items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--router", default="fused_select")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--exports", type=int, default=3, help="of each form; the median counts")
    parser.add_rounds(25)
    parser.add_record()
    flags = parser.parse_args(arguments)
    check_sizes("bench.export", exports=flags.exports, rounds=flags.rounds)
    console = Console()
    with TemporaryDirectory() as root, Progress(console=console, transient=True) as progress:
        rows = measure(flags, progress, Path(root))
    console.print(_table(rows, f"decoder_moe, {flags.batch} x {flags.seq_len} tokens, {flags.router}"))
    print_noise(console, {f"{row['form']} {key}": spread for row in rows for key, spread in row["spread"].items()})
    if flags.json:
        packages = {name: metadata.version(name) for name in _PACKAGES}
        write_record(flags.json, "export", {"settings": vars(flags), "packages": packages, "forms": rows})
