"""decoder_moe in onnxruntime: every router, any shape, idle experts, ties, fp16."""

import re
from functools import partial

import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_export import FILES, VOCAB, contents, difference, export, graph, tiny_moe

from moe_lightning.export.agreement import open_session
from moe_lightning.export.moe_forms import evaluation_copy
from moe_lightning.routers import ROUTERS, Sinkhorn

#: Of each kind of choice in evaluation one router; the others' graphs are the same.
KINDS = {
    "fused_select": ("naive_topk", "masked_matmul", "topk", "frozen_random", "sinkhorn"),
    "aux_free": ("quantile",),
    "hash": (),
    "expert_choice": (),
    "expert_threshold": (),
}


def test_routers_of_a_kind_choose_alike_in_evaluation():
    assert {*KINDS, *(name for others in KINDS.values() for name in others)} == set(ROUTERS)
    logits_TE = torch.randn(50, 8)
    for name, others in KINDS.items():
        expected = ROUTERS[name](16, 8, 2).eval().select(logits_TE)
        for other in others:
            selection = ROUTERS[other](16, 8, 2).eval().select(logits_TE)
            assert torch.equal(selection.expert_ids_TK, expected.expert_ids_TK), other
            torch.testing.assert_close(selection.weights_TK, expected.weights_TK)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """(model, folder), for each router: experts 1 and 2 have equal logits, and expert 3 is met by no token."""
    torch.manual_seed(0)
    router = partial(ROUTERS[request.param], skew_experts=3, skew_bias=10.0)
    model = tiny_moe(router, num_experts=4)
    with torch.no_grad():
        model.moe_layers[0].router.weight[2] = model.moe_layers[0].router.weight[1]
    folder = tmp_path_factory.mktemp(request.param)
    done = export(model, folder)
    assert done.largest_difference <= 1e-5
    assert done.checked_shape == (3, 8)
    return model, folder


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 1), (5, 17)])
def test_any_batch_and_length_can_be_run(exported, shape):
    model, folder = exported
    assert difference(folder, model, torch.randint(0, VOCAB, shape)) <= 1e-5


def test_shared_experts_zero_experts_and_dense_layers(tmp_path):
    parts = {"n_shared_experts": 1, "shared_expert_gate": True, "n_zero_experts": 3, "n_dense_layers": 1, "n_layers": 2}
    model = tiny_moe("topk", **parts)
    assert export(model, tmp_path).largest_difference <= 1e-5
    assert difference(tmp_path, model, torch.randint(0, VOCAB, (3, 11))) <= 1e-5


def test_a_pair_with_named_axes_and_weights(exported):
    _, folder = exported
    assert contents(folder) == FILES
    onnx.checker.check_model(str(folder / "__model__"))
    written = graph(folder).graph
    axes = [dim.dim_param for dim in written.input[0].type.tensor_type.shape.dim]
    assert (written.input[0].name, axes) == ("tokens", ["batch", "seq"])
    assert [output.name for output in written.output] == ["logits", "expert_ids"]
    logits_axes = [dim.dim_param or dim.dim_value for dim in written.output[0].type.tensor_type.shape.dim]
    assert logits_axes == ["batch", "seq", VOCAB]


def test_nodes_and_weights_have_the_names_of_their_modules(exported):
    model, folder = exported
    written = graph(folder).graph
    nodes = [node.name for node in written.node]
    assert len(set(nodes)) == len(nodes)
    assert all(re.fullmatch(r"(network[.\w]*/)?[A-Za-z]+(_\d+)?", name) for name in nodes)
    assert {"network.blocks.0.attention.qkv/MatMul", "network.blocks.0.feed_forward.experts.3/Gemm"} <= set(nodes)
    weights = [i.name for i in written.initializer if not re.fullmatch(r"constant_\d+", i.name)]
    own = {f"network.{name}" for name, _ in model.named_parameters() if ".experts." not in name}
    buffers = {f"network.{name}" for name, _ in model.named_buffers()}
    assert {name for name in weights if ".experts." not in name} - buffers == own


def test_every_experts_weights_are_in_the_file(exported):
    model, folder = exported
    written = {i.name: numpy_helper.to_array(i, str(folder)) for i in graph(folder).graph.initializer}
    for layer, moe in enumerate(model.moe_layers):
        for which, stacked in (("up", moe.experts.up), ("down", moe.experts.down)):
            for expert, weight in enumerate(stacked.detach()):
                name = f"network.blocks.{layer}.feed_forward.experts.{expert}.{which}"
                assert torch.equal(torch.tensor(written[name]), weight), name


def test_the_exported_model_is_untouched(exported):
    model, _ = exported
    assert type(model.blocks[0].feed_forward).__name__ == "MoE"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen in (set(), {"blocks.0.feed_forward.router.weight"})


def test_ties_go_to_the_lower_id_and_an_expert_may_stay_idle(exported):
    model, folder = exported
    ids_LTK = open_session(folder).run(["expert_ids"], {"tokens": torch.randint(0, VOCAB, (4, 16)).numpy()})[0]
    rows = {tuple(e for e in row if e >= 0) for row in ids_LTK[0].tolist()}
    router = model.moe_layers[0].router
    if router.looks_ahead:  # experts 1 and 2 take the same tokens
        assert all((1 in row) == (2 in row) for row in rows)
        assert any(1 in row for row in rows)
    elif router.needs_token_ids:
        assert len(rows) > 2  # which go by the word alone
    else:
        assert rows == {(0, 1), (1, 2)}  # experts 1 and 2 tie in every token


def test_a_training_model_is_exported_in_evaluation_and_fp16(tmp_path):
    options = {"dropout": 0.5, "activation": "gelu", "tie_embeddings": True}
    model = tiny_moe(lambda *sizes: Sinkhorn(*sizes, capacity_factor=0.5), **options).train()
    export(model, tmp_path, dtype=torch.float16)
    half = evaluation_copy(model, torch.float16)
    difference(tmp_path, half, torch.randint(0, VOCAB, (4, 3)))  # raises
    written = graph(tmp_path).graph
    assert written.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert not {"Dropout", "RandomUniformLike", "Bernoulli"} & {node.op_type for node in written.node}
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
