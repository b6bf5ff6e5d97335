"""The ONNX graph of a whole model, with dynamic batch and sequence axes."""

from __future__ import annotations

import onnx_ir
from torch import Tensor

from moe_lightning.export.exportable import Outputs
from moe_lightning.export.function_moe import add_functions
from moe_lightning.export.trace import trace


def build_graph(model: Outputs, inputs: Tensor) -> onnx_ir.Model:
    """Trace `model` on `inputs`: ids (B, S), named "tokens", or rows (B, hidden), named "x". Both B, S >= 2.

    The values in `inputs` do not matter, nor do B and S: any batch and sequence may be run.
    """
    if inputs.is_floating_point():
        return trace(model, inputs, "x", ["batch"], model.names)
    graph = trace(model, inputs, "tokens", ["batch", "seq"], model.names)
    add_functions(graph, model)
    return graph
