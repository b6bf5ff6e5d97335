"""What all pictures of benchmarks share."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

DPI = 150
SUFFIXES = (".png", ".svg", ".pdf")
LINE_COLOURS = ("#3b6fb6", "#c8553d", "#3a9a6b", "#8c6bb1", "#e08b2c", "#555555")
MARKERS = "osD^vP"


def check_path(component: str, path: str | None) -> None:
    """Raise ValueError for a kind of picture that cannot be written."""
    if path is not None and Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{component}: --plot must end in {', '.join(SUFFIXES)}, got {path}")


def save(figure: Figure, path: str) -> None:
    """Write the picture; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
