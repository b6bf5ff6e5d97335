"""An MoE layer as one box: a node `MoELayer` whose inside, the portable form, is an ONNX function of the file.

Legend: B batch, S sequence, T = B * S tokens, D d_model, K top_k.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from moe_lightning.export.portable import PortableMoE
from moe_lightning.export.structure import structure
from moe_lightning.export.trace import trace

DOMAIN = "moe_lightning"
NAME = "MoELayer"


class FunctionMoE(PortableMoE):
    """`layer` as a node that takes the rows and every weight of router and experts, and gives rows and expert ids."""

    boxed = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), and the expert ids (T, K) int32; of no use outside a trace."""
        if not self.boxed:
            return super().forward(x)
        y_BSD, ids_TK = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            (x, *self.parameters()),
            dtypes=(x.dtype, torch.int32),
            shapes=(x.shape, (x.shape[0] * x.shape[1], self.router.top_k)),
            version=1,
        )
        return y_BSD, ids_TK

    def inside(self) -> onnx_ir.Graph:
        """The graph in the box."""
        opened = copy.copy(self)
        opened.boxed = False
        weight: Any = self.experts[0].up
        rows_BSD = torch.zeros(2, 3, weight.shape[-1], dtype=weight.dtype)
        return trace(opened, rows_BSD, "x", ["batch", "seq"], ["y", "expert_ids"]).graph


def add_functions(model: onnx_ir.Model, module: nn.Module) -> None:
    """Give `model`, the graph of `module`, the inside of its boxes: one function for all layers that are alike."""
    layers = [layer for layer in module.modules() if isinstance(layer, FunctionMoE)]
    boxes = [node for node in model.graph if node.domain == DOMAIN]
    found: list[list[Any]] = []
    for layer, box in zip(layers, boxes, strict=True):
        buffers = [buffer.tolist() for buffer in layer.buffers()]  # constants of the inside
        if (of_layer := [structure(layer), buffers]) not in found:
            found.append(of_layer)
            function = _function(layer, _name(len(found)))
            model.functions[function.identifier()] = function
        box.op_type = _name(found.index(of_layer) + 1)


def _name(number: int) -> str:
    return NAME if number == 1 else f"{NAME}_{number}"


def _function(layer: FunctionMoE, name: str) -> onnx_ir.Function:
    """The layer's graph with its weights as inputs and its constants as nodes: a function has no initializers."""
    graph = layer.inside()
    weights = [graph.initializers.pop(weight, onnx_ir.Value(name=weight)) for weight, _ in layer.named_parameters()]
    first = graph[0]
    for constant_name, value in list(graph.initializers.items()):
        constant = onnx_ir.node("Constant", [], {"value": value.const_value}, name=constant_name)
        constant.outputs[0].name = constant_name
        del graph.initializers[constant_name]
        value.replace_all_uses_with(constant.outputs[0])
        graph.insert_before(first, constant)
    for weight in weights:
        weight.const_value = None
    graph.inputs.extend(weights)
    return onnx_ir.Function(DOMAIN, name, graph=graph, attributes=[])
