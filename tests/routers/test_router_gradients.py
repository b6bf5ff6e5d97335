"""Row 13: gradients, against finite differences and against an fp64 reference."""

import pytest
import torch
from router_reference import both_modes, every_router, learning_router, make, naive_weights, ranked_router

from moe_lightning.routers import Router


@both_modes
@every_router
def test_weights_against_finite_differences(name, training):
    router = make(name, 7, 3, training)
    # Spaced so widely that no step of 1e-6 changes the choice.
    logits_TE = torch.stack([torch.randperm(7) for _ in range(5)]).double() * torch.linspace(0.4, 0.6, 5)[:, None]
    logits_TE.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: router.select(logits).weights_TK, (logits_TE,))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (64, 2), (100, 32), (1024, 8)])
@both_modes
@ranked_router
def test_logits_against_fp64(name, training, experts, top_k):
    logits_TE = torch.randn(33, experts, requires_grad=True)
    selection = make(name, experts, top_k, training).select(logits_TE)
    grad_TK = torch.randn(33, top_k)
    selection.weights_TK.backward(grad_TK)

    exact_TE = logits_TE.detach().double().requires_grad_()
    weights_TK = naive_weights(exact_TE, selection.expert_ids_TK.tolist(), name)
    weights_TK.backward(grad_TK.double())
    torch.testing.assert_close(selection.weights_TK.detach().double(), weights_TK.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits_TE.grad.double(), exact_TE.grad, rtol=1e-4, atol=1e-6)
    chosen_TE = torch.zeros(33, experts, dtype=torch.bool).scatter(1, selection.expert_ids_TK.long(), True)
    assert logits_TE.grad[~chosen_TE].eq(0).all()


@both_modes
@learning_router
def test_gate_and_input_against_fp64(name, training):
    router = make(name, 8, 2, training)
    x_TD, grad_TK = torch.randn(40, 16, requires_grad=True), torch.randn(40, router.slots)
    routing = router(x_TD)
    routing.selection.weights_TK.backward(grad_TK)

    exact_x_TD, exact_gate = x_TD.detach().double().requires_grad_(), router.weight.detach().double().requires_grad_()
    exact_TE = exact_x_TD @ exact_gate.T
    naive_weights(exact_TE, routing.selection.expert_ids_TK.tolist(), name).backward(grad_TK.double())
    torch.testing.assert_close(routing.logits_TE.detach().double(), exact_TE.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(x_TD.grad.double(), exact_x_TD.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(router.weight.grad.double(), exact_gate.grad, rtol=1e-4, atol=1e-6)


@every_router
def test_gate_stays_fp32_under_autocast_unless_told_otherwise(name):
    def logits(router: Router) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return router.gate(x_TD)

    x_TD = torch.randn(20, 16)
    precise, coarse = make(name, 8, 2), make(name, 8, 2, fp32_logits=False)
    coarse.load_state_dict(precise.state_dict())
    assert logits(precise).equal(x_TD @ precise.weight.T)
    assert logits(coarse).dtype == torch.bfloat16
    torch.testing.assert_close(logits(coarse).float(), logits(precise), rtol=2e-2, atol=2e-3)
