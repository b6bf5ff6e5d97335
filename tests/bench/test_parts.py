"""The parts that are timed are the layer's own: the same calls, which chained give the same outputs and gradients."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moe_lightning.bench.cli import Parser, Settings
from moe_lightning.bench.ep.measure import _router
from moe_lightning.bench.roofline import Peaks, Shape
from moe_lightning.bench.router.case import backward_parts, build_case, forward_parts, movement_part
from moe_lightning.layers import Experts, Phase
from moe_lightning.layers.dispatch import Dispatched
from moe_lightning.layers.phases import PHASES
from moe_lightning.routers import ROUTERS

SHAPE = Shape(tokens=24, d_model=16, num_experts=4, top_k=2, mlp_hidden_dim=8, size=4)
SETTINGS = Settings(torch.device("cpu"), torch.float32, tuple(ROUTERS), True, 3, 0.5, 0, 0.0, 1)


@pytest.fixture(params=[False, True], ids=["weights combined after", "weights folded into the experts"])
def fused_weights(request, monkeypatch):
    """As where CUTLASS computes the experts, or as elsewhere."""
    monkeypatch.setattr(Experts, "fuses_weights", lambda *_: request.param)
    return request.param


def tensors(value):
    """Of a structure, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, tuple) else []


def case_of(router):
    return build_case(router, SHAPE, SETTINGS, Peaks(1e12, 1e12))


@pytest.mark.parametrize("router", ROUTERS)
def test_steps_in_a_chain_are_the_layer(router, fused_weights):
    case = case_of(router)
    moe, x_TD, steps = case.moe, case.x_TD, case.moe.steps(case.x_TD)
    assert tuple(steps) == PHASES
    assert (steps[Phase.UNPACK].inputs[1].row_weights is not None) == (fused_weights and not case.masked)
    for phase, following in pairwise(PHASES):  # what a step returns is what the next one gets
        output = steps[phase].call(*steps[phase].inputs)
        output = output.rows if isinstance(output, Dispatched) else output
        given = steps[following].inputs[1 if following is Phase.PERMUTE else 0]
        if phase is Phase.EXPERTS and moe.router.drops_tokens:  # rows of dropped slots may hold anything
            kept = steps[phase].inputs[1][-1]
            output, given = output[:kept], given[:kept]
        for ours, theirs in zip(tensors(output), tensors(given), strict=True):
            assert torch.equal(ours, theirs)
    leaves = (x_TD, *(p for p in moe.parameters() if p.requires_grad))
    expected_TD = moe(x_TD)[0]
    y_TD = steps[Phase.UNPACK].call(*steps[Phase.UNPACK].inputs)
    assert torch.equal(y_TD, expected_TD)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (y_TD, expected_TD)), strict=True):
        assert torch.equal(ours, theirs)
    moved_TD = movement_part(moe, x_TD)(False)()
    assert torch.equal(moved_TD, expected_TD)


@pytest.mark.parametrize("router", ROUTERS)
def test_parts_make_the_calls_of_the_layer(router, fused_weights, monkeypatch):
    """What is handed to the experts and to combining: whether rows have their weights, and who applies them."""
    case = case_of(router)
    moe, seen = case.moe, []
    forward, combine = Experts.forward, type(moe.dispatcher).combine

    def watched_forward(self, rows, offsets, weights=None, *rest):
        seen.append(("experts", rows.shape, rows.stride(), weights is not None))
        return forward(self, rows, offsets, weights, *rest)

    def watched_combine(self, rows, dispatched):
        seen.append(("combine", rows.shape, rows.stride(), dispatched.row_weights is not None))
        return combine(self, rows, dispatched)

    monkeypatch.setattr(Experts, "forward", watched_forward)
    monkeypatch.setattr(type(moe.dispatcher), "combine", watched_combine)
    moe(case.x_TD)
    of_layer = list(seen)
    factories = forward_parts(moe, case.x_TD, case.rows_out, True)
    seen.clear()  # of the pass that the steps were recorded in
    for name in ("T_experts", "T_unpack"):
        factories[name](False)()
    assert seen == of_layer
    assert [folded for *_, folded in seen] == [fused_weights and not case.masked] * 2


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_reach_the_experts_as_in_the_layer(router, fused_weights, monkeypatch):
    """Shape and strides of the gradient of the experts' output: masked combining leaves it token by token."""
    case = case_of(router)
    forward, seen = Experts.forward, []

    def watched(*arguments):
        rows = forward(*arguments)
        rows.register_hook(lambda gradient: seen.append((gradient.shape, gradient.stride())))
        return rows

    monkeypatch.setattr(Experts, "forward", watched)
    case.moe(case.x_TD)[0].sum().backward()
    backward_parts(case.moe, case.x_TD, case.rows_out, True, case.generator)["T_experts"](False)()
    in_layer, in_part = seen
    assert in_part == in_layer


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_all_parts_are_all_gradients_of_the_layer(router, fused_weights):
    """Who gets a gradient: with folded weights the experts' part has that of the weights, combining has none."""
    case = case_of(router)
    factories = backward_parts(case.moe, case.x_TD, case.rows_out, True, case.generator)
    counts = {name: sum(gradient is not None for gradient in make(False)()) for name, make in factories.items()}
    folded = fused_weights and not case.masked
    assert counts["T_experts"] == 1 + 2 + folded  # rows, two weights, and the combine weights
    assert counts["T_unpack"] == 2 - folded  # rows, and the combine weights
    gates = int(case.moe.router.weight.requires_grad)
    assert counts["layer"] == 1 + gates + 2
    assert counts["T_logit"] == counts["route"] == 1 + gates  # tokens, and the gate
    assert counts["T_pack"] == 2  # tokens, and the combine weights


@pytest.mark.parametrize("build", [lambda: case_of("sinkhorn").moe.router, lambda: _router("sinkhorn", SHAPE, SETTINGS, torch.device("cpu"))])  # fmt: skip # noqa: E501
def test_settings_reach_the_router(build):
    router = build()
    assert (router.iterations, router.temperature) == (3, 0.5)


def test_flags_reach_the_settings():
    parser = Parser("router", None)
    parser.add_routers(ROUTERS, "naive_topk", "fp16")
    parser.add_results(rounds=25)
    flags = ["--device", "cpu", "--strategy", "sinkhorn", "--sinkhorn_iters", "4", "--sinkhorn_temperature", "0.25"]
    flags += ["--skew_experts", "2", "--skew_bias", "1.5", "--rounds", "6"]
    settings = parser.settings(parser.parse_args(flags), backward=True)
    assert settings == replace(
        SETTINGS,
        routers=("sinkhorn",),
        sinkhorn_iters=4,
        sinkhorn_temperature=0.25,
        skew_experts=2,
        skew_bias=1.5,
        rounds=6,
    )
    assert settings.router_options("sinkhorn") == {
        "iterations": 4, "temperature": 0.25, "skew_experts": 2, "skew_bias": 1.5,
    }  # fmt: skip
    assert settings.router_options("naive_topk") == {"skew_experts": 2, "skew_bias": 1.5}
