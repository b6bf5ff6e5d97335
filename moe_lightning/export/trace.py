"""From a torch module to an ONNX graph whose weights and nodes carry the module's own names."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx_ir import tensor_adapters
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch.export import Dim

from moe_lightning.export.operators import expert_loop_onnx, stable_sort
from moe_lightning.ops import select
from moe_lightning.ops.select import Rule


def strip_initializers(graph: onnx_ir.Graph, model: nn.Module) -> None:
    """Keep only names and shapes, so that nothing done to the graph depends on the values of a weight."""
    names = tensors_of(model)
    for name, value in graph.initializers.items():
        if name in names:
            value.const_value = None


def attach_initializers(graph: onnx_ir.Graph, model: nn.Module) -> None:
    """Set the weights to those of `model`, without copying.

    Raises:
        ValueError: the graph has weights that the model lacks, lacks one of its parameters, or has one of another form.
    """
    tensors = tensors_of(model)
    missing = {id(parameter): name for name, parameter in model.named_parameters()}
    wrong = []
    for name, value in graph.initializers.items():
        tensor = tensors.get(name)
        if tensor is None:
            if value.const_value is None:
                wrong.append(f"{name} without a tensor")
            continue
        given = tensor_adapters.TorchTensor(tensor.detach(), name=name)
        if value.shape != given.shape or value.dtype != given.dtype:
            wrong.append(f"{name} of {value.dtype} {value.shape} for {given.dtype} {given.shape}")
        value.const_value = given
        missing.pop(id(tensor), None)
    wrong += [f"no {name}" for name in missing.values()]
    if wrong:
        raise ValueError(f"export: the graph's weights must be the model's, got {'; '.join(wrong[:5])}; trace it again")


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """A tied weight under all its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


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
    owners = {
        str(value.name).rpartition(".")[0] for value in node.inputs if value is not None and value.name in weights
    }
    if len(owners) == 1:
        return owners.pop()
    noted = node.metadata_props.get(_SCOPES)
    if noted is not None:
        modules = ast.literal_eval(noted)[:-1]
        return modules[-1] if modules and not modules[-1].startswith("_") else ""
    producers = (value.producer() for value in node.inputs if value is not None)
    return next((scopes[producer] for producer in producers if producer in scopes), "")


def structure(module: nn.Module) -> list[Any]:
    """All of a module but its tensors' values: modules of equal structure have the same graph."""
    return [_facts(part) for part in module.modules()]


def _facts(module: nn.Module) -> tuple[Any, ...]:
    plain = {name: v for name, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None), tuple))}
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return type(module), plain, [(name, tensor.shape, tensor.dtype) for name, tensor in tensors]


#: The project's own operators, in torch's: what a graph is written in.
_IN_TORCH: dict[Any, Any] = {
    torch.ops.moe_lightning.select_forward.default: lambda logits_TE, top_k, *rule: tuple(
        select(logits_TE, top_k, "torch", **Rule(*rule)._asdict())
    )
}
#: What torch has no ONNX for.
_IN_ONNX: dict[Any, Any] = {
    torch.ops.aten.sort.stable: stable_sort,
    torch.ops.moe_lightning.expert_loop.default: expert_loop_onnx,
}


def trace(module: nn.Module, inputs: Tensor, input_name: str, axes: Sequence[str], outputs: list[str]) -> onnx_ir.Model:
    """The graph of `module`, a function of one tensor; its parameters are initializers of the same names.

    Args:
        module: what is traced, in evaluation.
        inputs: of any values; the size of an axis named in `axes` must be at least 2.
        input_name: of the graph's one input.
        axes: names of the first axes, which may have any size when the graph is run.
        outputs: names of the module's outputs.
    """
    dims = {axis: Dim(name) for axis, name in enumerate(axes)}
    with _quiet(), torch.no_grad():
        traced = torch.export.export(module, (inputs,), dynamic_shapes=(dims,), strict=False)
        if any(node.target in _IN_TORCH for node in traced.graph.nodes):
            traced = traced.run_decompositions(_IN_TORCH)
        program = torch.onnx.export(
            traced,
            input_names=[input_name],
            output_names=outputs,
            custom_translation_table=_IN_ONNX,
            dynamic_shapes=(dims,),  # names them
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("export: torch.onnx.export must return a program, got None")
        graph = program.model.graph
        strip_initializers(graph, module)
        optimize_ir(program.model)
    weights = set(tensors_of(module))
    name_nodes(graph, weights)
    name_constants(graph, weights)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # five times the graph's size in stack traces
    attach_initializers(graph, module)
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about its internals."""
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
