"""Names that a person can read: a node's is its module's and its operator, `network.blocks.0.attention.qkv/MatMul`."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir

#: Where torch's exporter notes the modules around a node, outermost first, and last the operator.
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(graph: onnx_ir.Graph, weights: set[str]) -> None:
    """Call each node MODULE/OPERATOR, from the second on with a number; for nodes of no module just OPERATOR.

    A node that takes one of the `weights`, by their names, is of that weight's module.
    """
    scopes: dict[onnx_ir.Node, str] = {}
    counts: Counter[str] = Counter()
    for node in graph.all_nodes():
        scopes[node] = _scope(node, scopes, weights)
        name = f"{scopes[node]}/{node.op_type}" if scopes[node] else node.op_type
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def name_constants(graph: onnx_ir.Graph, weights: set[str]) -> None:
    """Number the initializers that are no weights: `constant_0`, `constant_1`, ..."""
    constants = [value for name, value in graph.initializers.items() if name not in weights]
    for number, value in enumerate(constants):
        value.name = f"constant_{number}"


def _scope(node: onnx_ir.Node, scopes: dict[onnx_ir.Node, str], weights: set[str]) -> str:
    """Of the innermost module; where the optimizer made the node, that of the node it takes its input from."""
    taken = {str(value.name).rpartition(".")[0] for value in node.inputs if value is not None and value.name in weights}
    if len(taken) == 1:
        return taken.pop()
    noted = node.metadata_props.get(_SCOPES)
    if noted is not None:
        modules = ast.literal_eval(noted)[:-1]
        return modules[-1] if modules and not modules[-1].startswith("_") else ""
    producers = (value.producer() for value in node.inputs if value is not None)
    return next((scopes[producer] for producer in producers if producer in scopes), "")
