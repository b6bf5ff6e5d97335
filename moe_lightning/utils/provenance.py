"""Where a result comes from: the command, the commit, the machine and the versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Date, command, commit, machine and versions, as plain types."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": commit(),
        "machine": _machine(),
        "versions": _versions(),
    }


def _command() -> str:
    """As it was typed; torchrun starts each rank as `python -u ...`."""
    arguments = sys.orig_argv[1:]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return " ".join(["python", *arguments])
    ranks = os.environ["LOCAL_WORLD_SIZE"]
    return " ".join(["torchrun", "--nproc_per_node", ranks, *arguments[arguments[0] == "-u" :]])


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def commit() -> dict[str, Any]:
    """`id`, and whether tracked files are `dirty`, i.e. differ from it; None is unknown.

    GIT_COMMIT and GIT_DIRTY (0 or 1) give both for a copy, whose own history may be none or another.
    """
    if commit := os.environ.get("GIT_COMMIT"):
        return {"id": commit, "dirty": {"0": False, "1": True}.get(os.environ.get("GIT_DIRTY", ""))}
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    # A record that was written is no change to the code that the next one measures.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs/benchmarks")
    return {"id": head, "dirty": None if head is None or changes is None else bool(changes)}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "") or (
        platform.processor() or platform.machine()
    )


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpus": gpus, "system": platform.platform()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "lightning", "moe_lightning"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


#: Names of fields in records from before 2026-12 -> today's.
_RENAMED = {
    "strategy": "router",
    "experts": "num_experts",
    "hidden_dim": "mlp_hidden_dim",
    "ffn": "mlp_hidden_dim",
    "ceilings": "peaks",
    "floor_us": "roofline_us",
    "floor_ms": "roofline_ms",
    "x_floor": "x_sol",
    "kept_mb": "saved_mb",
}


def current_names(results: Any) -> Any:
    """The results of a benchmark record, the fields of an older one under the names of today."""
    if isinstance(results, dict):
        return {_RENAMED.get(name, name): current_names(value) for name, value in results.items()}
    return [current_names(value) for value in results] if isinstance(results, list) else results
