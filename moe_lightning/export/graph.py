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

from moe_lightning.export.expert_loop import expert_loop_onnx
from moe_lightning.export.exportable import Outputs
from moe_lightning.export.layers import first_layer_alone, layers_alike, repeat_layer
from moe_lightning.export.stable_sort import stable_sort
from moe_lightning.export.weights import give_weights, take_weights
from moe_lightning.ops import select

#: The project's own operators, in torch's: what a graph is written in.
_IN_TORCH: dict[Any, Any] = {
    torch.ops.moe_lightning.select_forward.default: lambda logits_TE, top_k, score, renormalize, bias_E, ranks_TE: (
        tuple(select(logits_TE, top_k, "torch", score=score, renormalize=renormalize, bias_E=bias_E, ranks_TE=ranks_TE))
    )
}
#: What torch has no ONNX for.
_IN_ONNX: dict[Any, Any] = {
    torch.ops.aten.sort.stable: stable_sort,
    torch.ops.moe_lightning.expert_loop.default: expert_loop_onnx,
}


def build_graph(model: Outputs, inputs: Tensor) -> onnx_ir.Model:
    """Trace `model` on `inputs`: ids (B, S), named "tokens", or rows (B, hidden), named "x". Both B, S >= 2.

    The values in `inputs` do not matter, nor do B and S: any batch and sequence may be run.
    """
    layers = layers_alike(model)
    traced = first_layer_alone(model) if layers > 1 else model
    with _quiet():
        graph = _trace(traced, inputs)
        take_weights(graph.graph, traced)
        optimize_ir(graph)
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # five times the graph's size in stack traces
    if layers > 1:
        repeat_layer(graph.graph, layers)
    give_weights(graph.graph, model)
    return graph


def _trace(model: Outputs, inputs: Tensor) -> onnx_ir.Model:
    axes = {0: Dim("batch"), 1: Dim("seq")} if _takes_ids(inputs) else {0: Dim("batch")}
    with torch.no_grad():
        traced = torch.export.export(model, (inputs,), dynamic_shapes=(axes,), strict=False)
        if any(node.target in _IN_TORCH for node in traced.graph.nodes):
            traced = traced.run_decompositions(_IN_TORCH)
        program = torch.onnx.export(
            traced,
            input_names=["tokens" if _takes_ids(inputs) else "x"],
            output_names=model.names,
            custom_translation_table=_IN_ONNX,
            dynamic_shapes=(axes,),  # names them
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("export: torch.onnx.export must return a program, got None")
    return program.model


def _takes_ids(inputs: Tensor) -> bool:
    return not inputs.is_floating_point()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
