"""A mistyped size is refused before memory is asked for it."""

from __future__ import annotations

import os

import torch


def check_fits_memory(component: str, parameters: int, **sizes: int) -> None:
    """Raise ValueError if `parameters` in torch's default dtype would not fit this machine's memory.

    Models made on the meta device take no memory and are not checked. `sizes` are named in the error.
    """
    if torch.get_default_device().type == "meta" or not hasattr(os, "sysconf"):
        return
    needed = parameters * torch.get_default_dtype().itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(
            f"{component}: the weights must fit in memory ({memory / 1e9:.0f} GB), got {needed / 1e9:.3g} GB "
            f"from {given}; make them smaller"
        )
