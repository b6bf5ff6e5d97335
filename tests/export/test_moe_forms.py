"""One MoE layer as onnxruntime's operator and as a function, run beside the layer itself.

Legend: B batch, S sequence, T = B * S tokens, D d_model, E experts, K top_k.
"""

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_lightning.export.moe_forms import MOE_FORMS, add_functions, as_logits
from moe_lightning.export.trace import trace
from moe_lightning.layers import Experts, MoE, SharedExperts
from moe_lightning.ops import Selection
from moe_lightning.routers import ROUTERS, Router, Tokens

D, E, K = 8, 4, 2


class Peculiar(Router):
    """Sigmoid weights, which do not sum to 1; expert 0 weighs nothing, and expert 1 drops who comes to it."""

    may_drop = True

    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        ids_TK = logits_TE.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k].int()
        weights_TK = logits_TE.gather(1, ids_TK.long()).sigmoid() * (ids_TK > 1)
        counts_E = (ids_TK[:, :, None] == torch.arange(self.num_experts)).sum((0, 1)).int()
        return Selection(weights_TK, torch.where(ids_TK == 1, -1, ids_TK), counts_E, torch.zeros((), dtype=torch.int32))


def layer(router: type[Router], activation: str = "swiglu", n_zero_experts: int = 0, **parts: nn.Module) -> MoE:
    """Weights so large that differences show; experts 2 and 3 have equal logits in every token."""
    choice = router(D, E + n_zero_experts, K)
    moe = MoE(choice, Experts(D, 12, E, activation), n_zero_experts=n_zero_experts, **parts).eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.5)
        moe.router.weight[3] = moe.router.weight[2]
    return moe


def session(moe: MoE, form: str, folder) -> onnxruntime.InferenceSession:
    exported = MOE_FORMS[form](moe)
    rows_BSD = torch.zeros(2, 3, D, dtype=moe.experts.up.dtype)
    model = trace(exported, rows_BSD, "x", ["batch", "seq"], ["y", "expert_ids"])
    add_functions(model, exported)
    onnx_ir.save(model, folder / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "layer.onnx", options, providers=["CPUExecutionProvider"])


HALF_GELU = (ROUTERS["sinkhorn"], "gelu", torch.float16, 1e-2)
#: One of each kind of choice in evaluation, see test_moe_export.
KINDS = [ROUTERS[name] for name in ("fused_select", "aux_free", "hash", "expert_choice", "expert_threshold")]
SINGLE = [(router, "swiglu", torch.float32, 1e-5) for router in (Peculiar, *KINDS)]


@pytest.mark.parametrize(
    ("form", "router", "activation", "dtype", "tolerance"),
    # The box holds the portable form, which test_moe_export runs with these routers.
    [*(("ort", *case) for case in SINGLE), ("function", *SINGLE[0]), ("function", *HALF_GELU)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_layer_in_onnxruntime(form, router, activation, dtype, tolerance, tmp_path):
    moe = layer(router, activation).to(dtype)
    run = session(moe, form, tmp_path).run
    for shape in ((1, 2), (1, 7), (5, 1), (6, 11)):
        x_BSD = torch.randn(*shape, D, dtype=dtype)
        x_BSD[0, 0] = 0  # every expert ties
        x_BSD[-1, -1, 0] = torch.nan
        with torch.no_grad():
            y_BSD, routing = moe(x_BSD)
        found_BSD, ids_TK = map(torch.from_numpy, run(None, {"x": x_BSD.numpy()}))
        assert torch.equal(ids_TK, routing.selection.expert_ids_TK)
        assert found_BSD[-1, -1].isnan().all()
        torch.testing.assert_close(found_BSD, y_BSD, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("form", list(MOE_FORMS))
def test_shared_and_zero_experts(form, tmp_path):
    moe = layer(ROUTERS["topk"], n_zero_experts=3, shared=SharedExperts(D, 12, gated=True))
    x_BSD = torch.randn(3, 7, D)
    with torch.no_grad():
        y_BSD, routing = moe(x_BSD)
    found_BSD, ids_TK = map(torch.from_numpy, session(moe, form, tmp_path).run(None, {"x": x_BSD.numpy()}))
    assert torch.equal(ids_TK, routing.selection.expert_ids_TK)
    assert ids_TK.max() >= E
    torch.testing.assert_close(found_BSD, y_BSD, rtol=1e-5, atol=1e-4)


def test_what_onnxruntimes_operator_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"export: onnx_moe ort must be fp32 .* got torch.float16; use --onnx_moe"):
        MOE_FORMS["ort"](layer(ROUTERS["naive_topk"]).half())
    with pytest.raises(ValueError, match=r"export: onnx_moe ort must have swiglu experts .* got activation=gelu; use"):
        MOE_FORMS["ort"](layer(ROUTERS["naive_topk"], "gelu"))


class Stack(torch.nn.Module):
    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for moe in self.layers:
            x = moe(x)[0]
        return (x,)


def test_layers_that_differ_have_functions_of_their_own():
    activations = ("swiglu", "gelu", "swiglu")
    stack = Stack([MOE_FORMS["function"](layer(ROUTERS["naive_topk"], activation)) for activation in activations])
    model = trace(stack, torch.zeros(2, 3, D), "x", ["batch", "seq"], ["y"])
    add_functions(model, stack)
    assert [node.op_type for node in model.graph] == ["MoELayer", "MoELayer_2", "MoELayer"]
    assert [function.name for function in model.functions.values()] == ["MoELayer", "MoELayer_2"]


def test_a_softmax_over_the_chosen_logits_gives_the_weights_back():
    weights_TK = torch.tensor([[0.7, 0.3], [0.9, 0.0], [0.0, 0.0], [0.5, 0.4], [1e-30, 1e-35], [torch.nan, torch.nan]])
    ids_TK = torch.tensor([[2, 0], [1, 3], [1, 2], [-1, 3], [0, 1], [0, 1]], dtype=torch.int32)
    zero = torch.zeros((), dtype=torch.int32)
    logits_TE, sum_T1 = as_logits(Selection(weights_TK, ids_TK, zero, zero), 4)
    assert logits_TE.isfinite().all()
    top_TK = logits_TE.topk(2)
    found_TE = torch.zeros(6, 4).scatter(1, top_TK.indices, top_TK.values.softmax(1) * sum_T1)
    expected_TE = torch.tensor(
        [[0.3, 0, 0.7, 0], [0, 0.9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.4], [1e-30, 1e-35, 0, 0], [torch.nan] * 2 + [0, 0]]
    )
    torch.testing.assert_close(found_TE[:5], expected_TE[:5], rtol=1e-4, atol=2e-38)
    assert found_TE[5, :2].isnan().all()
