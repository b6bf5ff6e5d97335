"""The quickstart with each router: `python -m moe_lightning.bench quickstart`.

Each run is `train.py fit`, as a user types it, in a process of its own; the figures are those of its summary.json,
times the medians over --runs, in which the routers are interleaved.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lightning.bench.cli import Parser
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import Spread, medians, print_noise, with_spread
from moe_lightning.bench.timers import orders
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_sizes

TIMES = ("step_ms", "route_share", "seconds")
_ROOT = Path(__file__).parents[3]


def train(config: str, router: str, extra: list[str], folder: Path) -> dict[str, Any]:
    """Validate the untrained model, train it, and return the run's summary with the loss it started from."""
    flags = [
        "--config", config, "--model.router", router, *extra,
        "--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", router,
    ]  # fmt: skip
    before = _run(["validate", *flags, "--trainer.logger.init_args.version", "before"])
    _run(["fit", *flags, "--trainer.logger.init_args.version", "run", "--onnx_export.enabled", "false"])
    summary = json.loads((folder / router / "run" / "summary.json").read_text())
    if "val/loss" not in summary["metrics"]:
        raise ValueError("bench.quickstart: a run must validate, got no val/loss; let it take more steps")
    del summary["checkpoint"], summary["onnx"]
    return {"loss_before": _value(before, "val/loss"), **summary}


def over_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run's summary with the times of all: medians, and their spread."""
    spread = {name: Spread.of([run[name] for run in runs]) for name in TIMES}
    phases = {name: Spread.of([run["times_ms"][name] for run in runs]) for name in runs[0]["times_ms"]}
    times = medians(spread) | {"times_ms": medians(phases)}
    return runs[0] | times | {"runs": len(runs), "spread": spread | phases}


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
    parser = Parser("quickstart", __doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--runs", type=int, default=3, help="of each router")
    parser.add_record()
    flags, extra = parser.parse_known_args(arguments)
    check_sizes("bench.quickstart", runs=flags.runs)
    console = Console()
    runs: dict[str, list[dict[str, Any]]] = {router: [] for router in dict.fromkeys(flags.routers)}
    order = [router for round_ in orders(runs, flags.runs) for router in round_]
    for router in track(order, "training", console=console, transient=True):
        with tempfile.TemporaryDirectory() as folder:
            runs[router].append(train(flags.config, router, extra, Path(folder)))
    results = {router: over_runs(own) for router, own in runs.items()}
    console = Console(width=max(console.width, 140))
    console.print(_table(results))
    spreads = {f"{router} {name}": spread for router, run in results.items() for name, spread in run["spread"].items()}
    print_noise(console, spreads, "--runs")
    if flags.json:
        write_record(flags.json, "quickstart", results)


def _table(results: dict[str, dict[str, Any]]) -> Table:
    runs = next(iter(results.values()))["runs"]
    # Of the worst layer, as MaxVio, which is max/mean less one (arXiv:2408.15664).
    table = Table(title=f"quickstart, {runs} run{'s' if runs > 1 else ''} per router")
    columns = (
        "router",
        "val loss",
        "perplexity",
        "T_route, ms",
        "of step",
        "step, ms",
        "max/mean",
        "MaxVio",
        "CV",
        "s",
        "GB",
    )
    for column in columns:
        table.add_column(column, justify="right" if column != "router" else "left", no_wrap=True)
    for router, run in results.items():
        spread = run["spread"]
        table.add_row(
            router,
            f"{run['loss_before']:.2f} -> {run['metrics']['val/loss']:.2f}",
            f"{run['metrics']['val/perplexity']:.2f}",
            with_spread(f"{run['times_ms']['T_route']:.1f}", spread["T_route"]),
            with_spread(f"{run['route_share']:.1%}", spread["route_share"]),
            with_spread(f"{run['step_ms']:.0f}", spread["step_ms"]),
            f"{max(run['max_over_mean_L']):.2f}",
            f"{max(run['max_over_mean_L']) - 1:.2f}",
            f"{max(run['cv_L']):.2f}",
            with_spread(f"{run['seconds']:.0f}", spread["seconds"]),
            f"{run['peak_memory_gb']:.2f}",
        )
    return table
