"""Checks of what a user types, and the one form their errors have: `component: rule, got values, what to do`.

Every floor may use this file; it imports nothing of the package.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Iterable


def check_int(component: str, name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    """`value` is an int (no bool, no float) in [low, high]; by default high is the largest int32."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{component}: {name} must be an integer, got {name}={value!r} ({type(value).__name__})")
    if not low <= value <= high:
        raise ValueError(f"{component}: {name} must be in [{low}, {high}], got {name}={value}")


def check_sizes(component: str, **sizes: int) -> None:
    """Every size is a positive integer that fits int32, the type of ids and offsets."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(f"{component}: {name} must be a positive integer below 2^31, got {name}={value!r}")


def check_fraction(component: str, name: str, value: float) -> None:
    """`value` is finite and in [0, 1)."""
    if not (_finite(value) and 0 <= value < 1):
        raise ValueError(f"{component}: {name} must be in [0, 1), got {name}={value}")


def check_not_negative(component: str, name: str, value: float) -> None:
    """`value` is finite and at least 0."""
    if not (_finite(value) and value >= 0):
        raise ValueError(f"{component}: {name} must be finite and at least 0, got {name}={value}")


def check_positive(component: str, name: str, value: float) -> None:
    """`value` is finite and above 0."""
    if not (_finite(value) and value > 0):
        raise ValueError(f"{component}: {name} must be positive and finite, got {name}={value}")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_choice(component: str, name: str, value: object, choices: Iterable[str]) -> None:
    """`value` is one of `choices`; the error lists them and offers the near matches."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{component}: {name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_installed(component: str, extra: str, *packages: str) -> None:
    """Packages of an extra of pyproject.toml can be imported."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{component}: {', '.join(packages)} must be installed, got no {', '.join(missing)}; run "
            f"`pip install -e '.[{extra}]'` in the repository"
        )
