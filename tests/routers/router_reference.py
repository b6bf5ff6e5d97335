"""The router contract written a second time, naively: Python's stable sort and fp64.

Legend: T tokens, E experts, K top_k.
"""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from moe_lightning.ops import Selection
from moe_lightning.routers import ROUTERS, Router

TOP_K_ROUTERS = ("naive_topk", "masked_matmul", "fused_select")
SIGMOID_ROUTERS = ("aux_free", "quantile")
#: Whose tokens have a number of experts that varies.
VARYING_ROUTERS = ("expert_choice", "expert_threshold")
UNRANKED_ROUTERS = ("hash", *VARYING_ROUTERS)
FROZEN_ROUTERS = ("frozen_random", "hash")
every_router = pytest.mark.parametrize("name", list(ROUTERS))
#: Those whose experts are in the order of the logits.
ranked_router = pytest.mark.parametrize("name", [name for name in ROUTERS if name not in UNRANKED_ROUTERS])
#: Of these, those whose weights are the softmax of the chosen.
softmax_router = pytest.mark.parametrize(
    "name", [name for name in ROUTERS if name not in (*UNRANKED_ROUTERS, *SIGMOID_ROUTERS)]
)
#: Those that learn from the weights.
learning_router = pytest.mark.parametrize("name", [name for name in ROUTERS if name not in FROZEN_ROUTERS])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make(name: str, num_experts: int, top_k: int, training: bool = False, **kwargs) -> Router:
    """A router by its registered name; d_model is one a test does not meet where it gives the logits itself."""
    return ROUTERS[name](16, num_experts, top_k, **kwargs).train(training)


def naive_ids(logits_TE: Tensor, top_k: int) -> list[list[int]]:
    """Logit descending, id ascending; NaN last."""
    ranked = [[-math.inf if math.isnan(v) else v for v in row] for row in logits_TE.double().tolist()]
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in ranked]


def naive_weights(logits_TE: Tensor, ids_TK: list[list[int]], name: str = "naive_topk") -> Tensor:
    """Of the selected logits in fp64, differentiable; rows are expected to be valid."""
    if name in VARYING_ROUTERS:
        scores_TE = logits_TE.double().softmax(1) if name == "expert_choice" else logits_TE.double().sigmoid()
        ids = torch.tensor(ids_TK)
        return torch.where(ids >= 0, scores_TE.gather(1, ids.clamp(min=0)), 0.0)
    chosen_TK = logits_TE.double().gather(1, torch.tensor(ids_TK))
    if name not in SIGMOID_ROUTERS:
        return torch.softmax(chosen_TK, 1)
    return chosen_TK.sigmoid() / chosen_TK.sigmoid().sum(1, keepdim=True)


def invalid(logits_TE: Tensor, top_k: int) -> list[bool]:
    """NaN or +inf somewhere, or fewer than K experts above -inf."""
    rows = logits_TE.double().tolist()
    return [any(math.isnan(v) or v == math.inf for v in row) or sum(v > -math.inf for v in row) < top_k for row in rows]


def check_legal(selection: Selection, logits_TE: Tensor, top_k: int, name: str = "naive_topk") -> None:
    """What holds for any input bits, in training and evaluation, for every router without a capacity limit."""
    tokens, num_experts = logits_TE.shape
    all_ids = selection.expert_ids_TK.tolist()
    ids = [[e for e in row if e >= 0] for row in all_ids] if name in VARYING_ROUTERS else all_ids
    assert selection.expert_ids_TK.dtype == selection.tokens_per_expert_E.dtype == torch.int32
    assert all(0 <= e < num_experts for row in ids for e in row)
    assert all(len(set(row)) == len(row) for row in ids)
    counts = Counter(e for row in ids for e in row)
    assert selection.tokens_per_expert_E.tolist() == [counts[e] for e in range(num_experts)]

    bad = invalid(logits_TE, top_k)
    assert selection.invalid_rows.item() == sum(bad)
    assert selection.weights_TK.dtype == (torch.float64 if logits_TE.dtype == torch.float64 else torch.float32)
    if name in VARYING_ROUTERS:
        _check_slots(selection, ids, bad, top_k)
        return
    assert [len(row) for row in ids] == [top_k] * tokens
    assert selection.weights_TK.isnan().tolist() == [[b] * top_k for b in bad]
    sums_T = selection.weights_TK[~torch.tensor(bad, dtype=torch.bool)].sum(1)
    sums_T = sums_T[sums_T > 0]  # sigmoids of the lowest numbers are 0
    torch.testing.assert_close(sums_T, torch.ones_like(sums_T))


def _check_slots(selection: Selection, ids: list[list[int]], bad: list[bool], top_k: int) -> None:
    """Used ones first; an invalid row has K, with NaN weights."""
    columns = selection.expert_ids_TK.shape[1]
    assert columns == min(selection.tokens_per_expert_E.numel(), 2 * top_k)
    used = [[True] * len(row) + [False] * (columns - len(row)) for row in ids]
    assert (selection.expert_ids_TK >= 0).tolist() == used
    assert all(len(row) == top_k for row, b in zip(ids, bad, strict=True) if b)
    nan_TM = selection.weights_TK.isnan()
    assert nan_TM.tolist() == [[u and b for u in row] for row, b in zip(used, bad, strict=True)]
    assert selection.weights_TK[selection.expert_ids_TK < 0].eq(0).all()
    assert ((selection.weights_TK >= 0) | nan_TM).all()
