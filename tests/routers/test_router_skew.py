import torch
from router_reference import SIGMOID_ROUTERS, both_modes, every_router, make, ranked_router


@both_modes
@every_router
def test_skew_adds_its_bias_to_the_first_experts_only(name, training):
    plain, skewed = make(name, 8, 2, training), make(name, 8, 2, training, skew_experts=3, skew_bias=2.5)
    skewed.load_state_dict(plain.state_dict())
    x_TD = torch.randn(20, 16)
    bias_E = torch.tensor([2.5] * 3 + [0.0] * 5)
    assert skewed.gate(x_TD).equal(plain.gate(x_TD) + bias_E)
    assert skewed(x_TD).logits_TE.equal(skewed.gate(x_TD))


@ranked_router
def test_a_large_skew_sends_every_token_to_the_first_experts(name):
    load_E = make(name, 8, 2, skew_experts=2, skew_bias=50.0)(torch.randn(30, 16)).selection.tokens_per_expert_E
    assert load_E.tolist() == [30, 30, 0, 0, 0, 0, 0, 0]
    load_E = make(name, 8, 2, skew_experts=6, skew_bias=-50.0)(torch.randn(30, 16)).selection.tokens_per_expert_E
    assert load_E.tolist() == [0, 0, 0, 0, 0, 0, 30, 30]


@every_router
def test_a_bias_without_experts_and_experts_without_bias_change_nothing(name):
    plain = make(name, 8, 2)
    x_TD = torch.randn(20, 16)
    for options in ({"skew_experts": 0, "skew_bias": 9.0}, {"skew_experts": 8, "skew_bias": 0.0}):
        router = make(name, 8, 2, **options)
        router.load_state_dict(plain.state_dict())
        assert router.gate(x_TD).equal(plain.gate(x_TD))


@every_router
def test_skew_is_not_part_of_the_checkpoint(name):
    learnt = ["weight", *(["bias_E"] if name in SIGMOID_ROUTERS else [])]
    learnt += ["threshold_E"] if name == "expert_threshold" else []
    assert list(make(name, 8, 2, skew_experts=3, skew_bias=2.0).state_dict()) == learnt


@every_router
def test_skew_keeps_a_half_gate_in_half(name):
    router = make(name, 8, 2, skew_experts=3, skew_bias=2.0, fp32_logits=False).bfloat16()
    assert router.gate(torch.randn(4, 16).bfloat16()).dtype == torch.bfloat16
