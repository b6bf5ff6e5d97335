"""`aten.sort.stable` in ONNX, for which torch has no translation."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op


def stable_sort(self: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """Values and indices of all elements along `dim`: TopK of them all, which gives equal ones lower index first."""
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))  # type: ignore[type-var]
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
