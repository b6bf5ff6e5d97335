"""The ONNX graph of a whole model, with dynamic batch and sequence axes.

Decoder layers that are identical but for their weights are traced once; the first one's graph is copied for the others.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from moe_lightning.export.moe_forms import Outputs, add_functions, sharing_weights
from moe_lightning.export.trace import attach_initializers, structure, trace

_DOMAIN = "moe_lightning.trace"
_BLOCKS = "network.blocks"
_FIRST = f"{_BLOCKS}.0"


def count_identical_layers(model: Outputs) -> int:
    """How many layers the model has, if they differ in nothing but weights; else 1."""
    blocks = getattr(model.network, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return 1
    first, *others = map(structure, blocks)
    return len(blocks) if all(other == first for other in others) else 1


def keep_first_layer(model: Outputs) -> Outputs:
    """The model with its first layer only, whose begin and end are marked in its graph; shares its weights."""
    model = sharing_weights(model)
    block: Any = model.network.get_submodule("blocks.0")
    block.register_forward_pre_hook(lambda _, arguments: (_marker("LayerBegin", arguments[0]), *arguments[1:]))
    block.register_forward_hook(lambda _, __, output: (_marker("LayerEnd", output[0]), *output[1:]))
    model.network.blocks = nn.ModuleList([block])
    return model


def _marker(name: str, x: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(f"{_DOMAIN}::{name}", (x,), dtype=x.dtype, shape=x.shape, version=1)


def repeat_layer(graph: onnx_ir.Graph, layers: int) -> None:
    """Give the graph of `keep_first_layer` all `layers`, weights under each layer's names, and no markers.

    Its outputs after the first, one per layer along their first axis, become those of all layers.
    """
    begin_marker, end_marker = (_node(graph, name) for name in ("LayerBegin", "LayerEnd"))
    begin, end = begin_marker.outputs[0], end_marker.inputs[0]
    assert end is not None
    per_layer = list(graph.outputs[1:])
    weights = [value for name, value in graph.initializers.items() if name.startswith(f"{_FIRST}.")]
    nodes = _between(graph, [begin, *weights], [end, *per_layer])
    parts = [[value] for value in per_layer]
    for layer in range(1, layers):
        values: dict[onnx_ir.Value | None, onnx_ir.Value] = {begin: end}
        for weight in weights:
            values[weight] = _copy(weight, _of_layer(str(weight.name), layer))
            graph.initializers.add(values[weight])
        for node in nodes:
            graph.append(_copy_node(node, values, layer))
        end = values[end_marker.inputs[0]]
        for part, value in zip(parts, per_layer, strict=True):
            part.append(values[value])
    end_marker.outputs[0].replace_all_uses_with(end)
    x = begin_marker.inputs[0]
    assert x is not None
    begin.replace_all_uses_with(x)
    graph.remove([begin_marker, end_marker], safe=True)
    for number, part in enumerate(parts, 1):
        _join(graph, number, part)
    graph.sort()


def _node(graph: onnx_ir.Graph, name: str) -> onnx_ir.Node:
    [node] = [node for node in graph if (node.domain, node.op_type) == (_DOMAIN, name)]
    return node


def _between(graph: onnx_ir.Graph, sources: list[onnx_ir.Value], sinks: list[onnx_ir.Value]) -> list[onnx_ir.Node]:
    """Nodes on a way from a source to a sink, in the graph's order."""
    after = set(sources)
    for node in graph:
        if any(value in after for value in node.inputs):
            after.update(node.outputs)
    before = set(sinks)
    for node in reversed(graph):
        if any(value in before for value in node.outputs):
            before.update(value for value in node.inputs if value is not None)
    return [node for node in graph if any(v in after for v in node.inputs) and any(v in before for v in node.outputs)]


def _copy(value: onnx_ir.Value, name: str) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=copy.copy(value.shape), type=value.type)


def _copy_node(node: onnx_ir.Node, values: dict[Any, onnx_ir.Value], layer: int) -> onnx_ir.Node:
    """A copy of the node with its inputs replaced by `values`, to which its outputs are added."""
    for output in node.outputs:
        values[output] = _copy(output, f"layer{layer}.{output.name}")
    return onnx_ir.Node(
        node.domain,
        node.op_type,
        [values.get(value, value) for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        outputs=[values[output] for output in node.outputs],
        version=node.version,
        name=_of_layer(str(node.name), layer),
    )


def _of_layer(name: str, layer: int) -> str:
    """The name that a weight or node of the first layer has in another."""
    within = name.startswith((f"{_FIRST}.", f"{_FIRST}/"))
    return f"{_BLOCKS}.{layer}{name.removeprefix(_FIRST)}" if within else f"layer{layer}.{name}"


def _join(graph: onnx_ir.Graph, number: int, parts: list[onnx_ir.Value]) -> None:
    """Make the values one output, along their first axis."""
    old = graph.outputs[number]
    new = _copy(old, str(old.name))
    new.shape = onnx_ir.Shape([len(parts), *(old.shape or [])[1:]])
    old.name = f"layer0.{old.name}"
    graph.append(onnx_ir.node("Concat", parts, {"axis": 0}, outputs=[new]))
    graph.outputs[number] = new


def build_graph(model: Outputs, inputs: Tensor) -> onnx_ir.Model:
    """Trace `model` on `inputs`: ids (B, S), named "tokens", or rows (B, hidden), named "x". Both B, S >= 2.

    The values in `inputs` do not matter, nor do B and S: any batch and sequence may be run.
    """
    layers = count_identical_layers(model)
    traced = keep_first_layer(model) if layers > 1 else model
    name, axes = ("x", ["batch"]) if inputs.is_floating_point() else ("tokens", ["batch", "seq"])
    graph = trace(traced, inputs, name, axes, model.names)
    if layers > 1:
        repeat_layer(graph.graph, layers)
        attach_initializers(graph.graph, model)
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
