"""The ONNX graph of a whole model, with dynamic batch and sequence axes."""

from __future__ import annotations

from typing import Any

import onnx_ir
from torch import Tensor

from moe_lightning.export.exportable import Outputs
from moe_lightning.export.function_moe import add_functions
from moe_lightning.export.layers import first_layer_alone, layers_alike, repeat_layer
from moe_lightning.export.trace import trace
from moe_lightning.export.weights import give_weights


def build_graph(model: Outputs, inputs: Tensor) -> onnx_ir.Model:
    """Trace `model` on `inputs`: ids (B, S), named "tokens", or rows (B, hidden), named "x". Both B, S >= 2.

    The values in `inputs` do not matter, nor do B and S: any batch and sequence may be run.
    """
    layers = layers_alike(model)
    traced = first_layer_alone(model) if layers > 1 else model
    name, axes = ("x", ["batch"]) if inputs.is_floating_point() else ("tokens", ["batch", "seq"])
    graph = trace(traced, inputs, name, axes, model.names)
    if layers > 1:
        repeat_layer(graph.graph, layers)
        give_weights(graph.graph, model)
    add_functions(graph, model)
    _drop_unused_opsets(graph)
    return graph


def _drop_unused_opsets(graph: onnx_ir.Model) -> None:
    """A runtime may refuse a domain that it does not know, though no node is of it."""
    parts: list[Any] = [graph.graph, *graph.functions.values()]
    for part in parts:
        used = {node.domain for node in part.all_nodes()}
        for domain in [domain for domain in part.opset_imports if domain and domain not in used]:
            del part.opset_imports[domain]
