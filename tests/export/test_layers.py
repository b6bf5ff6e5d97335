"""Layers that are alike are traced once and copied, others are not; any weights can be put in."""

import onnx_ir
import pytest
import torch
from tiny_export import VOCAB, difference, graph, tiny_moe
from torch import nn

from moe_lightning.export.graph import count_identical_layers
from moe_lightning.export.model_files import TracedModel
from moe_lightning.export.moe_forms import MOE_FORMS, Outputs, exportable
from moe_lightning.export.trace import attach_initializers
from moe_lightning.layers import Experts, MoE
from moe_lightning.models.decoder import Decoder, DecoderConfig
from moe_lightning.routers import NaiveTopK


def three_layers():
    """Of one form; the bias of their routers differs."""
    model = tiny_moe(lambda *sizes: NaiveTopK(*sizes, skew_experts=1), n_layers=3)
    for number, layer in enumerate(model.moe_layers):
        layer.router.skew_E[0] = number - 1.0
    return model


def uneven(hidden_dims):
    layers = [MoE(NaiveTopK(16, 3, 2), Experts(16, hidden_dim, 3)) for hidden_dim in hidden_dims]
    return Decoder(DecoderConfig(vocab_size=VOCAB, d_model=16, n_heads=2), layers).eval()


def as_outputs(model: nn.Module) -> Outputs:
    return Outputs(exportable(model, "portable"))


def test_layers_of_a_copied_graph_are_each_their_own(tmp_path):
    model = three_layers()
    assert count_identical_layers(as_outputs(model)) == 3
    traced = TracedModel(model, seq_len=5)
    traced.write(tmp_path)  # compares
    written = graph(tmp_path).graph
    assert [dim.dim_value for dim in written.output[1].type.tensor_type.shape.dim][::2] == [3, 2]
    names = [name for node in written.node for name in (*node.output, node.name)]
    assert len(names) == len(set(names))
    assert not {node.domain for node in written.node} - {""}

    other = {name: torch.randn_like(value) * 0.1 for name, value in model.state_dict().items()}
    traced.load(other)
    traced.write(tmp_path)
    tokens = torch.randint(0, VOCAB, (2, 7))
    with pytest.raises(ValueError, match="export: "):
        difference(tmp_path, model, tokens)
    model.load_state_dict(other)
    assert difference(tmp_path, model, tokens) <= 1e-5

    with pytest.raises(ValueError, match=r"the weights must be the traced model's, got .*head\.weight"):
        traced.load({name: value for name, value in other.items() if name != "head.weight"})


@pytest.mark.parametrize("moe_form", MOE_FORMS)
def test_other_weights_in_every_form(moe_form, tmp_path):
    model = three_layers()
    traced = TracedModel(model, seq_len=5, moe_form=moe_form)
    traced.load({name: torch.randn_like(value) * 0.1 for name, value in model.state_dict().items()})
    assert traced.write(tmp_path).largest_difference <= 1e-5


def test_layers_that_differ_are_not_copied():
    assert count_identical_layers(as_outputs(uneven((8, 8)))) == 2
    assert count_identical_layers(as_outputs(uneven((8, 16)))) == 1
    model = three_layers()
    model.moe_layers[1].router.extra = 1
    assert count_identical_layers(as_outputs(model)) == 1


def test_a_graph_without_one_of_the_weights_is_refused():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    initializer = onnx_ir.Value(name="used.weight", shape=onnx_ir.Shape([2, 2]), type=onnx_ir.TensorType(1))
    initializer.const_value = onnx_ir.tensor(torch.zeros(2, 2).numpy())
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[initializer])
    with pytest.raises(ValueError, match=r"the graph's weights must be the model's, got no unused\.weight"):
        attach_initializers(graph, Forgetful())
