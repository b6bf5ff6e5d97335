"""The comparison notices other experts and other outputs; how far rounding may go is told by the model's own error."""

from types import SimpleNamespace

import pytest
import torch
from tiny_export import VOCAB, tiny_moe

from moe_lightning.export.agreement import Computed, NearTieError, compare, compute, same_experts
from moe_lightning.export.moe_forms import evaluation_copy
from moe_lightning.models import MLP
from moe_lightning.ops import Selection
from moe_lightning.routers import ROUTERS, Routing


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


class Shifted(Stub):
    """A session whose outputs are the model's in the wider type and an error besides."""

    def __init__(self, model, error):
        super().__init__(model)
        self.error = error

    def run(self, names, feed):
        outputs = compute(self.model, torch.from_numpy(feed["tokens"]))[1].outputs
        return [(outputs + self.error).to(next(self.model.parameters()).dtype).numpy()]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1.0), (torch.float16, 30.0), (torch.float32, 3e4)])
def test_the_models_own_error_is_the_measure(dtype, scale):
    model = evaluation_copy(MLP(64), dtype)
    rows = scale * torch.randn(3, 64).to(dtype)
    ours, exact = compute(model, rows)
    own = float((ours.outputs - exact.outputs).abs().max())
    step = torch.finfo(dtype).eps * float(exact.outputs.abs().max())
    assert own < 4 * step
    assert own > 1e-5
    compare(Shifted(model, 2 * own), model, rows)
    with pytest.raises(ValueError, match="export: outputs must differ by at most"):
        compare(Shifted(model, 2 * own + 2 * step), model, rows)
    with pytest.raises(ValueError, match="got nan"):
        compare(Shifted(model, torch.nan), model, rows)


def test_in_fp32_1e_5_is_always_allowed():
    model, rows = evaluation_copy(MLP(64), torch.float32), torch.randn(3, 64)
    compare(Shifted(model, 9e-6), model, rows)
    with pytest.raises(
        ValueError, match=r"export: outputs must differ by at most 1e-05 from the model's in torch.float64"
    ):
        compare(Shifted(model, 2e-5), model, rows)


def computed(logits_LTE, ids_LTK, dtype=torch.float16, router=None):
    """Of two rows of four positions."""
    routings = [
        Routing(logits_TE, Selection(torch.ones(8, 1), ids_TK, torch.zeros(2), torch.zeros(())))
        for logits_TE, ids_TK in zip(logits_LTE, ids_LTK, strict=True)
    ]
    routers = (router or ROUTERS["naive_topk"](8, 2, 1),) * len(routings)
    return Computed(torch.zeros(2, 4, 5, dtype=dtype), tuple(routings), tuple(r.logits_TE for r in routings), routers)


def test_positions_behind_another_choice_are_not_compared():
    logits_LTE = torch.tensor([1.0, 0.0]).repeat(2, 8, 1)
    logits_LTE[0, 2, 1] = 1 - 1e-4  # third position of the first row, first layer
    logits_LTE[1, 7, 1] = 1 - 1e-4
    ids_LTK = torch.zeros(2, 8, 1, dtype=torch.int32)
    exact, ours = computed(logits_LTE, ids_LTK, torch.float32), computed(logits_LTE, ids_LTK)
    file_LTK = ids_LTK.clone()
    file_LTK[0, 2] = 1
    file_LTK[1, 3] = 1  # what came of that
    own_LTK = ids_LTK.clone()
    own_LTK[1, 7] = 1
    same_BS = same_experts(computed(logits_LTE, own_LTK), exact, file_LTK)
    assert same_BS.tolist() == [[True, True, False, False], [True, True, True, False]]
    file_LTK[1, 4] = 1  # no near tie, and nothing before it
    with pytest.raises(ValueError, match="1 tokens with other experts in layer 1"):
        same_experts(ours, exact, file_LTK)


@pytest.mark.parametrize("illegal", [-1, 2])
def test_ids_out_of_range_are_no_near_tie(illegal):
    logits_LTE, ids_LTK = torch.zeros(1, 8, 2), torch.zeros(1, 8, 1, dtype=torch.int32)
    logits_LTE[..., 1] = -1e-4
    with pytest.raises(ValueError, match="export: expert ids must be equal"):
        same_experts(computed(logits_LTE, ids_LTK), computed(logits_LTE, ids_LTK), torch.full_like(ids_LTK, illegal))


@pytest.mark.parametrize(
    ("scores", "true", "file", "legal"),
    [
        ([1.0, 1.0, 1.0 + 1e-7], [2, 0], [2, 1], False),  # a tie is left for a higher id
        ([1.0, 1.0, 1.0 + 1e-7], [2, 0], [0, 1], True),
        ([1.0, 1.0 - 1e-7, 1.0 - 1e-7], [0, 1], [1, 2], True),  # the first was passed by both of a tie
        ([1.0, 1.0 + 1e-7, 1.0 + 1e-7], [1, 2], [0, 1], True),  # it passed both
        ([1.0, 1.0, 0.0], [0, 1], [1, 0], False),  # a tie in the wrong order
        ([1.0, 1.0, 1.0], [0, 1], [0, 2], False),
        ([1.0, 1.0 + 1e-7, 0.0], [1, 0], [0, 1], True),
        ([1.0, 0.9, 0.0], [0, 1], [1, 0], False),  # far apart
    ],
)
def test_rounding_may_swap_what_is_near_and_not_what_ties(scores, true, file, legal):
    scores_TE = torch.tensor([scores] * 8, dtype=torch.float64)
    true_TK = torch.tensor([true] * 8, dtype=torch.int32)
    ours = computed(scores_TE.float()[None], true_TK[None], torch.float32)
    exact = computed(scores_TE[None], true_TK[None], torch.float64)
    file_TK = true_TK.clone()
    file_TK[3] = torch.tensor(file)
    if legal:
        assert same_experts(ours, exact, file_TK[None]).tolist() == [[True] * 3 + [False], [True] * 4]
    else:
        with pytest.raises(ValueError, match="1 tokens with other experts in layer 0"):
            same_experts(ours, exact, file_TK[None])


@pytest.mark.parametrize(
    ("scores", "true", "file", "legal"),
    [
        ([0.9, 0.5 + 1e-8, 0.2], [0, 1], [0, -1], True),  # at its threshold
        ([0.9, 0.5 - 1e-8, 0.2], [0, -1], [0, 1], True),
        ([0.9, 0.51, 0.2], [0, 1], [0, -1], False),
        ([0.9, 0.2, 0.3], [0, -1], [0, 2], False),
        ([0.9, 0.8, 0.8 - 1e-8], [0, 1], [0, 2], True),  # who has room
        ([0.9, 0.8, 0.8], [0, 1], [0, 2], False),  # the lower id has
        ([0.9, 0.8, 0.7], [0, 1], [0, 2], False),
        ([0.9, 0.8, 0.2], [0, 1], [0, 3], False),
    ],
)
def test_rounding_may_decide_at_a_threshold(scores, true, file, legal):
    router = ROUTERS["expert_threshold"](8, 3, 1)
    router.threshold_E.fill_(0.5)
    scores_TE, true_TM = torch.tensor([scores] * 8, dtype=torch.float64), torch.tensor([true] * 8, dtype=torch.int32)
    ours = computed(scores_TE.float()[None], true_TM[None], torch.float32, router)
    exact = computed(scores_TE[None], true_TM[None], torch.float64, router)
    file_TM = true_TM.clone()
    file_TM[3] = torch.tensor(file)
    if legal:
        assert same_experts(ours, exact, file_TM[None]).tolist() == [[True] * 3 + [False], [True] * 4]
    else:
        with pytest.raises(ValueError, match="1 tokens with other experts in layer 0"):
            same_experts(ours, exact, file_TM[None])


def test_where_tokens_compete_no_other_choice_is_compared():
    router = ROUTERS["expert_choice"](8, 3, 1)
    scores_TE, ids_TM = torch.rand(8, 3), torch.zeros(8, 2, dtype=torch.int32)
    exact = computed(scores_TE[None], ids_TM[None], torch.float32, router)
    assert same_experts(exact, exact, ids_TM[None]).all()
    with pytest.raises(NearTieError):
        same_experts(exact, exact, ids_TM[None].index_fill(1, torch.tensor([3]), 1))
