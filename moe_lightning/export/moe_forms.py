"""The exportable forms of an MoE layer, and a copy of a model that has them.

portable: operators that every ONNX runtime has; for each expert, gather its tokens and add its outputs.
ort: onnxruntime's own operator `com.microsoft.MoE`, one node for all experts.
function: a node `MoELayer` whose body, the portable form, is an ONNX function of the file.

Legend: B batch, S sequence, V vocabulary, L MoE layers, T = B * S tokens, D d_model, F expert hidden size, E experts,
K top_k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import onnx_ir
import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.export.operators import expert_loop
from moe_lightning.export.trace import structure, trace
from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.shared_experts import add_unrouted, without_zero_experts
from moe_lightning.models import MLP, DecoderMoE, LMOutput
from moe_lightning.ops import Selection
from moe_lightning.routers import NO_TOKENS, Tokens, router_name


class RoutedForm(nn.Module):
    """What the forms share: the layer's router, and what a token gets beside its routed experts."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.num_experts, self.n_zero_experts = layer.num_experts, layer.n_zero_experts
        self.shared = layer.shared

    def select(self, x_TD: Tensor, tokens: Tokens) -> tuple[Selection, Selection]:
        """The router's choice, and what of it is sent to experts."""
        selection = self.router.select(self.router.gate(x_TD), tokens)
        return selection, without_zero_experts(selection, self.num_experts) if self.n_zero_experts else selection


class PortableMoE(RoutedForm):
    """What `layer` computes, as one `expert_loop` after the router; shares its weights."""

    def __init__(self, layer: MoE) -> None:
        super().__init__(layer)
        self.activation = layer.experts.activation
        self.experts = nn.ModuleList(PortableExpert(layer.experts, e) for e in range(layer.num_experts))

    @override
    def forward(self, x: Tensor, tokens: Tokens = NO_TOKENS) -> tuple[Tensor, Tensor]:
        """(..., D) -> (..., D), and the expert ids (T, K) int32; sums over a token's experts are fp32."""
        x_TD = x.reshape(-1, x.shape[-1])
        selection, routed = self.select(x_TD, tokens)
        ups, downs = ([getattr(expert, name) for expert in self.experts] for name in ("up", "down"))
        y_TD = expert_loop(x_TD, routed.expert_ids_TK, routed.weights_TK, ups, downs, self.activation)
        y_TD = add_unrouted(y_TD.to(x.dtype), x_TD, selection, self.num_experts, self.shared)
        return y_TD.view_as(x), selection.expert_ids_TK


class PortableExpert(nn.Module):
    """One expert's weights, so that they have a name of their own in the graph."""

    def __init__(self, experts: Experts, number: int) -> None:
        super().__init__()
        self.up = nn.Parameter(experts.up.detach()[number], requires_grad=False)
        self.down = nn.Parameter(experts.down.detach()[number], requires_grad=False)


#: Far below the logarithm of any weight, and finite: the operator's softmax takes no infinities.
_NEVER = -1e30


class OrtMoE(RoutedForm):
    """What `layer` computes. The operator routes by the softmax of the K largest of what it is given: it is given the
    logarithms of the weights that the layer's own router chose, so that any router fits.

    Raises:
        ValueError: the operator has no such case.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__(layer)
        if layer.experts.up.dtype != torch.float32:
            raise ValueError(
                f"export: onnx_moe ort must be fp32 (weights of the choice would be rounded to less), got "
                f"{layer.experts.up.dtype}; use --onnx_moe portable"
            )
        if layer.experts.activation != "swiglu":
            raise ValueError(
                f"export: onnx_moe ort must have swiglu experts (onnxruntime's gelu is the tanh approximation), got "
                f"activation={layer.experts.activation}; use --onnx_moe portable"
            )
        self.experts = OrtExperts(layer.experts)

    @override
    def forward(self, x: Tensor, tokens: Tokens = NO_TOKENS) -> tuple[Tensor, Tensor]:
        """(..., D) -> (..., D), and the expert ids (T, K) int32; the rows are of no use outside a trace."""
        x_TD = x.reshape(-1, x.shape[-1])
        selection, routed = self.select(x_TD, tokens)
        choice_TE, sum_T1 = as_logits(routed, self.num_experts)
        y_TD = torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            (x_TD, choice_TE, self.experts.up_interleaved, None, self.experts.down),
            {
                "k": self.router.slots,
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
                "normalize_routing_weights": 1,
            },
            dtype=x.dtype,
            shape=x_TD.shape,
            version=1,
        )
        y_TD = add_unrouted(y_TD * sum_T1, x_TD, selection, self.num_experts, self.shared)
        return y_TD.view_as(x), selection.expert_ids_TK


class OrtExperts(nn.Module):
    """The experts' weights as the operator takes them: up (E, 2F, D) with rows gate 0, up 0, gate 1, up 1, ..."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        gate_EFD, up_EFD = experts.up.detach().chunk(2, 1)
        self.up_interleaved = nn.Parameter(torch.stack((gate_EFD, up_EFD), 2).flatten(1, 2), requires_grad=False)
        self.down = nn.Parameter(experts.down.detach(), requires_grad=False)


def as_logits(selection: Selection, num_experts: int) -> tuple[Tensor, Tensor]:
    """Logits (T, E) whose softmax over the K largest is the weights chosen over their sum, and that sum (T, 1).

    A dropped slot (id -1) is of no expert; a weight of 0 becomes the smallest number there is, which has a logarithm.
    """
    weights_TK, ids_TK = selection.weights_TK, selection.expert_ids_TK
    tiny = torch.finfo(weights_TK.dtype).tiny
    chosen_TKE = ids_TK[:, :, None] == torch.arange(num_experts, device=ids_TK.device)
    sum_T1 = torch.where(ids_TK >= 0, weights_TK, 0.0).sum(1, keepdim=True)
    share_TK = weights_TK / sum_T1
    # NaN > tiny is false: a row of NaN weights, or of zeros alone, chooses as any other; the sum makes it NaN, or zero.
    share_TE = torch.where(chosen_TKE, torch.where(share_TK > tiny, share_TK, tiny)[:, :, None], 0.0).sum(1)
    return torch.where(chosen_TKE.any(1), share_TE.log(), _NEVER), sum_T1


DOMAIN = "moe_lightning"
NAME = "MoELayer"


class FunctionMoE(PortableMoE):
    """`layer` as a node that takes the rows and every weight of router and experts, and gives rows and expert ids."""

    as_node = True

    def __init__(self, layer: MoE) -> None:
        super().__init__(layer)
        if layer.router.needs_token_ids:
            raise ValueError(
                f"export: a layer as a function has rows alone for input, got {router_name(layer.router)}, which "
                "routes by token ids; use --onnx_moe portable"
            )

    @override
    def forward(self, x: Tensor, tokens: Tokens = NO_TOKENS) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), and the expert ids (T, K) int32; of no use outside a trace."""
        if not self.as_node:
            return super().forward(x)
        y_BSD, ids_TK = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            (x, *self.parameters()),
            dtypes=(x.dtype, torch.int32),
            shapes=(x.shape, (x.shape[0] * x.shape[1], self.router.slots)),
            version=1,
        )
        return y_BSD, ids_TK

    def function_body(self) -> onnx_ir.Graph:
        """The graph of the function that the node calls."""
        body = copy.copy(self)
        body.as_node = False
        weight: Any = self.experts[0].up
        rows_BSD = torch.zeros(2, 3, weight.shape[-1], dtype=weight.dtype)
        return trace(body, rows_BSD, "x", ["batch", "seq"], ["y", "expert_ids"]).graph


def add_functions(model: onnx_ir.Model, module: nn.Module) -> None:
    """Add the functions of the `MoELayer` nodes to `model`, the graph of `module`: one for all identical layers."""
    layers = [layer for layer in module.modules() if isinstance(layer, FunctionMoE)]
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    known: list[list[Any]] = []
    for layer, node in zip(layers, nodes, strict=True):
        buffers = [buffer.tolist() for buffer in layer.buffers()]  # constants of the body
        if (of_layer := [structure(layer), buffers]) not in known:
            known.append(of_layer)
            function = _function(layer, _name(len(known)))
            model.functions[function.identifier()] = function
        node.op_type = _name(known.index(of_layer) + 1)


def _name(number: int) -> str:
    return NAME if number == 1 else f"{NAME}_{number}"


def _function(layer: FunctionMoE, name: str) -> onnx_ir.Function:
    """The layer's graph with its weights as inputs and its constants as nodes: a function has no initializers."""
    graph = layer.function_body()
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

    @override
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
