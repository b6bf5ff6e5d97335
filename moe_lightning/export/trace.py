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

from moe_lightning.export.expert_loop import expert_loop_onnx
from moe_lightning.export.names import name_constants, name_nodes
from moe_lightning.export.stable_sort import stable_sort
from moe_lightning.export.weights import give_weights, take_weights, tensors_of
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
        take_weights(graph, module)
        optimize_ir(program.model)
    weights = set(tensors_of(module))
    name_nodes(graph, weights)
    name_constants(graph, weights)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # five times the graph's size in stack traces
    give_weights(graph, module)
    return program.model


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
