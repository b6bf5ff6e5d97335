"""A graph's weights, by the names of the model they come from."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir
from onnx_ir import tensor_adapters
from torch import Tensor, nn


def take_weights(graph: onnx_ir.Graph, model: nn.Module) -> None:
    """Leave names and shapes alone, so that nothing done to the graph depends on what a weight holds."""
    names = tensors_of(model)
    for name, value in graph.initializers.items():
        if name in names:
            value.const_value = None


def give_weights(graph: onnx_ir.Graph, model: nn.Module) -> None:
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
        raise ValueError(f"export: the graph's weights must be the model's, got {'; '.join(wrong[:5])}; trace it anew")


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """A tied weight under all its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
