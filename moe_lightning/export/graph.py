"""From a model to an ONNX graph with dynamic batch and sequence axes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor
from torch.export import Dim

from moe_lightning.export.exportable import Outputs
from moe_lightning.export.stable_sort import stable_sort
from moe_lightning.ops import select

#: The project's own operators, in torch's: what a graph is written in.
_IN_TORCH: dict[Any, Any] = {
    torch.ops.moe_lightning.select_forward.default: lambda logits_TE, top_k, score, renormalize, bias_E, ranks_TE: (
        tuple(select(logits_TE, top_k, "torch", score=score, renormalize=renormalize, bias_E=bias_E, ranks_TE=ranks_TE))
    )
}


def build_graph(model: Outputs, inputs: Tensor) -> onnx_ir.Model:
    """Trace `model` on `inputs`: ids (B, S), named "tokens", or rows (B, hidden), named "x". Both B, S >= 2.

    The values in `inputs` do not matter, nor do B and S: any batch and sequence may be run.
    """
    axes = {0: Dim("batch"), 1: Dim("seq")} if _takes_ids(inputs) else {0: Dim("batch")}
    with _quiet(), torch.no_grad():
        traced = torch.export.export(model, (inputs,), dynamic_shapes=(axes,), strict=False)
        if any(node.target in _IN_TORCH for node in traced.graph.nodes):
            traced = traced.run_decompositions(_IN_TORCH)
        program = torch.onnx.export(
            traced,
            input_names=["tokens" if _takes_ids(inputs) else "x"],
            output_names=model.names,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            dynamic_shapes=(axes,),  # names them
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("export: torch.onnx.export must return a program, got None")
    weights = {name for name, _ in model.named_parameters()}
    # A folded weight would lose its name.
    optimize_ir(
        program.model,
        should_fold=lambda node: False if any(v is not None and v.name in weights for v in node.inputs) else None,
    )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # five times the graph's size in stack traces
    return program.model


def _takes_ids(inputs: Tensor) -> bool:
    return not inputs.is_floating_point()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
