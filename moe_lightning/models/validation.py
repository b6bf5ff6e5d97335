"""Ranges of the arguments that all models share, checked before any weight is made."""

from __future__ import annotations

import math


def check_sizes(component: str, **sizes: int) -> None:
    """Every size is a positive integer that fits int32, the type of ids and offsets."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(f"{component}: {name} must be a positive integer below 2^31, got {name}={value!r}")


def check_fraction(component: str, name: str, value: float) -> None:
    """A probability: finite and in [0, 1)."""
    if not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(f"{component}: {name} must be in [0, 1), got {name}={value}")


def check_not_negative(component: str, name: str, value: float) -> None:
    """A coefficient: finite and at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{component}: {name} must be finite and at least 0, got {name}={value}")
