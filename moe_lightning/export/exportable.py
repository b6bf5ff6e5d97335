"""A copy of a model that can be traced: evaluation, on the CPU, in one dtype, its MoE layers in an exportable form.

Legend: B batch, S sequence, V vocabulary, L MoE layers, T = B * S tokens, K top_k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from moe_lightning.export.function_moe import FunctionMoE
from moe_lightning.export.ort_moe import OrtMoE
from moe_lightning.export.portable import PortableMoE
from moe_lightning.layers import MoE
from moe_lightning.models import MLP, DecoderMoE, LMOutput

Model = TypeVar("Model", bound=nn.Module)

#: The exportable forms of an MoE layer, by the name of `--onnx_moe`; the first is the default. They give expert ids
#: (T, K) where `MoE` gives a `Routing`.
MOE_FORMS: Mapping[str, Callable[[MoE], nn.Module]] = {
    "portable": PortableMoE,
    "ort": OrtMoE,
    "function": FunctionMoE,
}


class Outputs(nn.Module):
    """A model whose outputs are plain tensors, in the order of `names`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.routes = isinstance(network, DecoderMoE)

    @property
    def names(self) -> list[str]:
        """ "y" of an MLP; "logits" (B, S, V) of a language model and, where it routes, "expert_ids" (L, T, K) int32."""
        if isinstance(self.network, MLP):
            return ["y"]
        return ["logits", "expert_ids"] if self.routes else ["logits"]

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Ids (B, S), or rows (B, hidden) for an MLP."""
        output = self.network(inputs)
        if not isinstance(output, LMOutput):
            return (output,)
        if not output.routings:
            return (output.logits_BSV,)
        return output.logits_BSV, torch.stack(cast("tuple[Tensor, ...]", output.routings))


def evaluation_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model's own layers in eval mode, on the CPU, in `dtype`; `model` stays as it is."""
    return copy.deepcopy(model).cpu().to(dtype).eval()


def exportable(network: nn.Module, moe_form: str) -> nn.Module:
    """A model that shares the weights of `network` and has every MoE layer in the form of that name."""
    network = sharing_weights(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, MoE):
            network.set_submodule(name, MOE_FORMS[moe_form](module))
    return network.eval()


def sharing_weights(model: Model) -> Model:
    """A copy of a module whose parameters and buffers are the module's own."""
    return copy_with(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def without_weights(model: Model) -> Model:
    """A copy of a module whose parameters have a shape and no memory."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy_with(model, empty)


def with_weights(model: Model, state: Mapping[str, Tensor]) -> Model:
    """A copy of a module whose parameters are those of `state`, by their names; ValueError where one is missing."""
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        raise ValueError(f"export: the weights must be the model's, got none for {', '.join(missing[:5])}")
    given = {id(p): nn.Parameter(state[name], requires_grad=False) for name, p in model.named_parameters()}
    return copy_with(model, given)


def copy_with(model: Model, tensors: Mapping[int, Tensor]) -> Model:
    """A copy of a module with other tensors in place of its own, by the `id` of those."""
    return copy.deepcopy(model, dict(tensors))  # as if they had been copied already
