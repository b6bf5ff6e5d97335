"""The quickstart with each router: `python -m moe_lightning.bench quickstart`.

Each run is `train.py fit`, as a user types it, in a process of its own; the figures are those of its summary.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_lightning.bench.record import write_record
from moe_lightning.routers import ROUTERS

_ROOT = Path(__file__).parents[2]


def train(config: str, router: str, extra: list[str], folder: Path) -> dict[str, Any]:
    """Validate the untrained model, train it, and return the run's summary with the loss it started from."""
    flags = [
        "--config", config, "--model.router", router, *extra,
        "--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", router,
    ]  # fmt: skip
    before = _run(["validate", *flags, "--trainer.logger.init_args.version", "before"])
    _run(["fit", *flags, "--trainer.logger.init_args.version", "run", "--onnx_export.enabled", "false"])
    summary = json.loads((folder / router / "run" / "summary.json").read_text())
    del summary["checkpoint"], summary["onnx"]
    return {"loss_before": _value(before, "val/loss"), **summary}


def _run(arguments: list[str]) -> str:
    command = [sys.executable, str(_ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "nothing on stderr").splitlines()[-1]
        raise ValueError(f"bench.quickstart: train.py must succeed, got {last}")
    return done.stdout


def _value(output: str, name: str) -> float:
    line = next(line for line in output.splitlines() if name in line)
    return float(line.replace("│", " ").split()[-1])


def main(arguments: list[str]) -> None:
    """Parse flags, train, print, record. Flags it does not know go to train.py."""
    parser = argparse.ArgumentParser(prog="python -m moe_lightning.bench quickstart", description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--json", metavar="FILE")
    flags, extra = parser.parse_known_args(arguments)
    results = {}
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        for router in flags.routers:
            with console.status(f"training with {router}"):
                results[router] = train(flags.config, router, extra, Path(folder))
    Console(width=max(console.width, 120)).print(_table(results))
    if flags.json:
        write_record(flags.json, "quickstart", results)


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="quickstart, a run a router")
    columns = ("router", "val loss", "perplexity", "T_route, ms", "of step", "step, ms", "max/mean", "CV", "s", "GB")
    for column in columns:
        table.add_column(column, justify="right" if column != "router" else "left", no_wrap=True)
    for router, run in results.items():
        table.add_row(
            router,
            f"{run['loss_before']:.2f} -> {run['metrics']['val/loss']:.2f}",
            f"{run['metrics']['val/perplexity']:.2f}",
            f"{run['times_ms']['T_route']:.1f}",
            f"{run['route_share']:.1%}",
            f"{run['step_ms']:.0f}",
            f"{max(run['max_over_mean_L']):.2f}",
            f"{max(run['cv_L']):.2f}",
            f"{run['seconds']:.0f}",
            f"{run['peak_memory_gb']:.2f}",
        )
    return table
