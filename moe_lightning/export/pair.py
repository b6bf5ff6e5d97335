"""The pair `__model__` and `__params__`: traced, written, run in onnxruntime, and only then put in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch
from torch import nn

from moe_lightning.checks import check_choice, check_sizes
from moe_lightning.export.agreement import TOLERANCE, largest_difference
from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE, check_directory, written_whole
from moe_lightning.export.exportable import MOE_FORMS, Outputs, evaluation_copy, exportable
from moe_lightning.export.graph import build_graph
from moe_lightning.models import MLP


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compared."""

    nodes: int
    model_bytes: int
    params_bytes: int
    checked_shape: tuple[int, ...]
    largest_difference: float


def export_onnx(
    model: nn.Module,
    directory: Path,
    *,
    batch: int = 2,
    seq_len: int = 128,
    dtype: torch.dtype = torch.float32,
    moe_form: str = "portable",
) -> Exported:
    """Write `model` to `directory` as an ONNX graph and its weights; an older pair there is replaced.

    Args:
        model: an MLP or a language model of `moe_lightning.models`; it stays as it is.
        directory: made if it does not exist; its other files stay.
        batch: rows of the traced input; any number can be run.
        seq_len: tokens a row of a language model's traced input; any number can be run.
        dtype: of weights and outputs, fp32 or fp16.
        moe_form: a name in `MOE_FORMS`.

    Raises:
        ValueError: an argument, or a directory that cannot be written to; or the written file, run in onnxruntime on
            fresh input of another shape, differs from the model. In each case nothing is left behind.
    """
    check_sizes("export", batch=batch, seq_len=seq_len)
    check_choice("export", "onnx_moe", moe_form, MOE_FORMS)
    if dtype not in TOLERANCE:
        raise ValueError(f"export: dtype must be fp32 or fp16, got {dtype}; onnxruntime's CPU has no bf16 products")
    check_directory(directory)
    reference = evaluation_copy(model, dtype)
    # Axes of size 1 would be traced as constants.
    traced = traced_shape(reference, max(batch, 2), max(seq_len, 2))
    inputs = torch.zeros(traced, dtype=dtype if isinstance(reference, MLP) else torch.int64)
    graph = build_graph(Outputs(exportable(reference, moe_form)), inputs)
    checked = traced_shape(reference, batch + 1, seq_len + 3 if seq_len < 16 else seq_len // 2 + 1)
    with written_whole(directory) as folder:
        onnx_ir.save(graph, folder / MODEL_FILE, external_data=PARAMS_FILE)
        (folder / PARAMS_FILE).touch()  # a model so small that all its weights stand in the graph is a pair too
        model_bytes, params_bytes = ((folder / name).stat().st_size for name in (MODEL_FILE, PARAMS_FILE))
        difference = largest_difference(folder, reference, checked)
    return Exported(len(list(graph.graph.all_nodes())), model_bytes, params_bytes, checked, difference)


def traced_shape(model: nn.Module, batch: int, seq_len: int) -> tuple[int, int]:
    """(B, hidden) for an MLP, (B, S) for a language model."""
    return (batch, model.first.in_features) if isinstance(model, MLP) else (batch, seq_len)
