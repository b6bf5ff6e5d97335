"""Arguments of the models: an error in one line, before any weight is made; routers of checkpoints of before."""

import re

import pytest
import yaml
from tiny_models import make_dense, make_moe

from moe_lightning import routers
from moe_lightning.models import MLP, MLPDecoder
from moe_lightning.models.hyperparameters import router_factory, stored_arguments, stored_config

SIZE_NAMES = ("d_model", "n_heads", "n_layers", "mlp_hidden_dim")


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, True, "8", None], ids=repr)
@pytest.mark.parametrize("name", [*SIZE_NAMES, "num_experts", "top_k"])
def test_sizes(name, value):
    named = re.escape(f"{name} must be a positive integer below 2^31, got {name}={value!r}")
    with pytest.raises(ValueError, match=rf"^decoder_moe: {named}$"):
        make_moe(**{name: value})
    if name in SIZE_NAMES:
        with pytest.raises(ValueError, match=rf"^transformer_decoder: {named}$"):
            make_dense(**{name: value})


@pytest.mark.parametrize("name", ["n_shared_experts", "n_zero_experts", "n_dense_layers"])
def test_parts_of_a_decoder_beside_experts(name):
    for value in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match=rf"^decoder_moe: {name} must be .* got {name}={value!r}"):
            make_moe(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"n_dense_layers": 2},
            r"n_dense_layers must leave a layer .*, got n_dense_layers=2, n_layers=2; ",
        ),
        ({"dense_hidden_dim": 8}, r"dense_hidden_dim needs dense layers, got dense_hidden_dim=8, n_dense_layers=0; "),
        ({"dense_hidden_dim": 0, "n_dense_layers": 1}, r"dense_hidden_dim must be .* got dense_hidden_dim=0"),
        ({"shared_expert_gate": True}, r"shared_expert_gate needs shared experts, got n_shared_experts=0; "),
        ({"n_shared_experts": 2**30}, r".* must fit in memory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"^decoder_moe: {message}"):
        make_moe(**arguments)


@pytest.mark.parametrize("make", [make_moe, make_dense, MLPDecoder])
def test_vocabulary(make):
    with pytest.raises(ValueError, match=r"vocab_size must be a positive integer below 2\^31, got vocab_size=-5$"):
        make(vocab_size=-5)


def test_mlp_width():
    with pytest.raises(ValueError, match=r"^mlp: hidden must be .* got hidden=0$"):
        MLP(0)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [make_moe, make_dense])
def test_dropout(make, dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got dropout={dropout}$"):
        make(dropout=dropout)


@pytest.mark.parametrize("make", [make_moe, make_dense])
def test_heads_must_divide_the_width(make):
    with pytest.raises(
        ValueError, match=r"^attention: d_model must be divisible by n_heads, got d_model=32, n_heads=5"
    ):
        make(n_heads=5)
    with pytest.raises(ValueError, match=r"must be even for rotary positions, got d_model=32, n_heads=32"):
        make(n_heads=32)


@pytest.mark.parametrize("top_k", [5, 99])
def test_more_choices_than_experts(top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, num_experts\], got top_k={top_k}, num_experts=4; "):
        make_moe(top_k=top_k)


def test_unknown_experts_and_activation():
    with pytest.raises(ValueError, match=r"^experts: implementation must be one of .* got 'magic'$"):
        make_moe(experts="magic")
    with pytest.raises(ValueError, match=r"^activation: must be 'swiglu' or 'gelu', got 'relu'$"):
        make_dense(activation="relu")


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [make_moe, make_dense])
def test_rope_theta(make, theta):
    with pytest.raises(ValueError, match=rf"rope_theta must be [^\n]*, got rope_theta={theta}[^\n]*$"):
        make(rope_theta=theta)


@pytest.mark.parametrize("name", ["naive_topk.NaiveTopK", "fused_select.FusedSelect", "masked_matmul.MaskedMatmul"])
def test_a_checkpoint_of_before_names_its_router_by_a_module_that_is_gone(name):
    path, kind = f"moe_lightning.routers.{name}", getattr(routers, name.rpartition(".")[2])
    for router in (path, {"class_path": path, "init_args": {"capacity_factor": 1.5}}):
        arguments = {"vocab_size": 8, "router": router}
        run_config = yaml.safe_dump({"model": {"class_path": "m.Module", "init_args": arguments}})
        for checkpoint in ({"hyper_parameters": arguments}, {"run_config": run_config}):
            made = router_factory(stored_arguments(checkpoint)["router"])(8, 4, 2)
            assert type(made) is kind
            assert made.capacity_factor == (1.5 if isinstance(router, dict) else None)
    stored = stored_config({"run_config": run_config})["model"]["init_args"]["router"]
    assert stored["class_path"] == f"moe_lightning.routers.topk.{kind.__name__}"
