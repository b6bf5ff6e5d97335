"""From a torch module to an ONNX graph whose weights and nodes carry the module's own names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch.export import Dim

from moe_lightning.export.names import name_constants, name_nodes
from moe_lightning.export.stable_sort import stable_sort
from moe_lightning.ops import select

#: The project's own operators, in torch's: what a graph is written in.
_IN_TORCH: dict[Any, Any] = {
    torch.ops.moe_lightning.select_forward.default: lambda logits_TE, top_k, score, renormalize, bias_E, ranks_TE: (
        tuple(select(logits_TE, top_k, "torch", score=score, renormalize=renormalize, bias_E=bias_E, ranks_TE=ranks_TE))
    )
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
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            dynamic_shapes=(dims,),  # names them
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("export: torch.onnx.export must return a program, got None")
    _simplify(program.model, [name for name, _ in module.named_parameters()])
    name_nodes(program.model.graph)
    name_constants(program.model.graph, {name for name, _ in module.named_parameters()})
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # five times the graph's size in stack traces
    return program.model


def _simplify(model: onnx_ir.Model, weights: list[str]) -> None:
    """Fold constants and drop repetitions.

    The weights are kept out of sight: one that is folded, or found equal to another as fresh norms are, loses its name.
    """
    initializers = model.graph.initializers
    values = [initializers.pop(name) for name in weights if name in initializers]
    tensors = [value.const_value for value in values]
    for value in values:
        value.const_value = None
    optimize_ir(model)
    for value, tensor in zip(values, tensors, strict=True):
        value.const_value = tensor
        if value.uses():
            initializers.add(value)


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
