"""An MoE layer as one box: a node `MoELayer` whose inside, the portable form, is an ONNX function of the file.

Legend: B batch, S sequence, T = B * S tokens, D d_model, K top_k.
"""

from __future__ import annotations

import onnx_ir
import torch
from torch import Tensor, nn

from moe_lightning.export.portable import PortableMoE
from moe_lightning.export.trace import trace
from moe_lightning.layers import MoE

DOMAIN = "moe_lightning"
NAME = "MoELayer"


class FunctionMoE(PortableMoE):
    """`layer` as a node that takes the rows and every weight of router and experts, and gives rows and expert ids."""

    def __init__(self, layer: MoE) -> None:
        super().__init__(layer)
        inside = PortableMoE(layer)
        weight = layer.experts.up
        rows_BSD = torch.zeros(2, 3, weight.shape[-1], dtype=weight.dtype)
        self.graph = trace(inside, rows_BSD, "x", ["batch", "seq"], ["y", "expert_ids"]).graph
        #: What the node takes beside the rows, in this order.
        self.weight_names = [name for name, _ in inside.named_parameters() if name in self.graph.initializers]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), and the expert ids (T, K) int32; of no use outside a trace."""
        y_BSD, ids_TK = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            (x, *(self.get_parameter(name) for name in self.weight_names)),
            dtypes=(x.dtype, torch.int32),
            shapes=(x.shape, (x.shape[0] * x.shape[1], self.router.top_k)),
            version=1,
        )
        return y_BSD, ids_TK


def add_functions(model: onnx_ir.Model, module: nn.Module) -> None:
    """Give `model`, the graph of `module`, the inside of its boxes: one function for all layers that are alike."""
    layers = [layer for layer in module.modules() if isinstance(layer, FunctionMoE)]
    boxes = [node for node in model.graph if node.domain == DOMAIN]
    named: dict[bytes, str] = {}
    for layer, box in zip(layers, boxes, strict=True):
        function = _function(layer, NAME)
        content = onnx_ir.serde.serialize_function(function).SerializeToString(deterministic=True)
        if content not in named:
            named[content] = NAME if not named else f"{NAME}_{len(named) + 1}"
            function = _function(layer, named[content])
            model.functions[function.identifier()] = function
        box.op_type = named[content]


def _function(layer: FunctionMoE, name: str) -> onnx_ir.Function:
    """The layer's graph with its weights as inputs and its constants as nodes: a function has no initializers."""
    graph = layer.graph.clone()
    weights = [graph.initializers.pop(weight) for weight in layer.weight_names]
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
