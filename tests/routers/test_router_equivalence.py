"""naive_topk, masked_matmul and fused_select: the same ids exactly, the same weights within fp32 rounding."""

import pytest
import torch
from router_reference import TOP_K_ROUTERS, both_modes, make

from moe_lightning.routers import ROUTERS


@pytest.mark.parametrize("std", [0.02, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_modes
def test_same_logits_same_choice(dtype, std, training):
    for experts, top_k in ((2, 1), (8, 2), (64, 6), (256, 8), (1024, 32)):
        logits_TE = (torch.randn(257, experts) * std).to(dtype)
        first, *others = (make(name, experts, top_k, training).select(logits_TE) for name in TOP_K_ROUTERS)
        for other in others:
            assert other.expert_ids_TK.equal(first.expert_ids_TK)
            assert other.tokens_per_expert_E.equal(first.tokens_per_expert_E)
            torch.testing.assert_close(other.weights_TK, first.weights_TK, rtol=1e-6, atol=1e-7)


def test_same_weights_same_gate():
    state = ROUTERS["naive_topk"](16, 8, 2).state_dict()
    x_TD, logits = torch.randn(9, 16), []
    for router_class in ROUTERS.values():
        router = router_class(16, 8, 2)
        assert router.load_state_dict(state, strict=False).missing_keys in ([], ["bias_E"], ["threshold_E"])
        logits.append(router.gate(x_TD))
    assert all(other.equal(logits[0]) for other in logits)


def test_masked_matmul_alone_moves_no_rows():
    movements = {name: ROUTERS[name].dispatch_mode for name in TOP_K_ROUTERS}
    assert movements == {"naive_topk": "permute", "masked_matmul": "masked", "fused_select": "permute"}
