"""The comparison notices other experts: at a true tie always, between near logits by asking for another input."""

from types import SimpleNamespace

import pytest
import torch
from tiny_export import VOCAB, tiny_moe

from moe_lightning.export.agreement import NearTieError, compare


class Stub:
    """A session that gives the model's own outputs, with the choices of every token in reverse."""

    def __init__(self, model):
        self.model = model

    def get_inputs(self):
        return [SimpleNamespace(name="tokens")]

    def run(self, names, feed):
        with torch.no_grad():
            output = self.model(torch.from_numpy(feed["tokens"]))
        ids_LTK = torch.stack([routing.selection.expert_ids_TK for routing in output.routings])
        return [output.logits_BSV.numpy(), ids_LTK.flip(2).numpy()]


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.0, ValueError), (1e-6, NearTieError), (0.1, ValueError)], ids=["tie", "near", "far"]
)
def test_other_experts(gap, expected):
    model = tiny_moe(num_experts=2, top_k=2)
    router = model.moe_layers[0].router
    with torch.no_grad():
        router.weight.zero_()
        router.skew_E.copy_(torch.tensor([gap, 0.0]))
    router.skew_experts = 1
    with pytest.raises(expected):
        compare(Stub(model), model, torch.randint(0, VOCAB, (2, 3)))
