"""How rows reach the experts and come back. A dispatcher is no module: it owns no weights.

Legend: T tokens, K top_k, N = T * K slots, E experts, D d_model.
`plan` returns a frozen plan that `dispatch` and `combine` take. Rows come in parts, one call of the experts each: on
one device a single part; across ranks (`parallel_dispatch`) a part a chunk, of rows that came and rows that stayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe_lightning.ops import RoutingIndex, RowWeights, Selection, build_index, permute, sum_rows, unpermute
from moe_lightning.ops.dtypes import sum_dtype


@dataclass(frozen=True)
class Part:
    """Rows for one call of the experts."""

    rows: Tensor
    """(N, D) sorted by expert, or (E, T, D)."""
    expert_offsets: Tensor | None
    """int32 (E + 1); None where every expert sees every row."""
    row_weights: RowWeights | None = None
    """The combine weights of these rows, for experts that fold them in."""
    buffer: Tensor | None = None
    """Like the rows: where experts may leave what they make of them, and the gradient, to save a copy."""
    group: int = 0
    """Which of the dispatcher's `expert_groups`: the offsets are of its experts alone."""


@dataclass(frozen=True)
class PermutePlan:
    """Rows sorted by expert: expert e owns rows [expert_offsets[e], expert_offsets[e + 1])."""

    index: RoutingIndex
    weights_TK: Tensor
    may_drop: bool


@dataclass(frozen=True)
class MaskedPlan:
    """Every expert sees every row; the mask holds a token's weight for each expert, 0 where it was not chosen."""

    mask_TE: Tensor


Plan = TypeVar("Plan")


class Dispatcher(Protocol[Plan]):
    """The interface of local and parallel movement."""

    carries_weights: bool
    """Whether parts hold their rows' combine weights."""
    expert_groups: int
    """Into how many equal groups of neighbours it cuts the experts; a part is for one of them."""
    parts: int
    """Of a pass; as many for each group."""
    ranks: int
    """Over how many the experts are spread."""

    def plan(self, selection: Selection) -> Plan:
        """Where each slot goes (T_index)."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Iterable[Part]:
        """Bring tokens (T, D) to their experts (T_permute); a part is there when it is taken."""

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> tuple[Tensor, ...]:
        """Start a part's rows, as the experts left them, on their way back; `weighted` as for `combine`."""

    def combine(self, rows: list[Tensor], plan: Plan, weighted: bool) -> Tensor:
        """Weighted sums (T, D) of all parts sent back (T_unpack); `weighted`: rows carry their weights already."""


class PermuteDispatcher:
    """One device, rows sorted by expert: (T, D) -> (N, D) -> (T, D)."""

    carries_weights = True
    expert_groups = parts = ranks = 1

    def __init__(self, num_experts: int, top_k: int, may_drop: bool) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.may_drop = may_drop

    def plan(self, selection: Selection) -> PermutePlan:
        """Sort the slots by expert."""
        index = build_index(selection.expert_ids_TK, self.num_experts)
        return PermutePlan(index, selection.weights_TK, self.may_drop)

    def dispatch(self, x_TD: Tensor, plan: PermutePlan) -> Iterable[Part]:
        """Gather the rows in that order."""
        rows_ND = permute(x_TD, plan.index, self.top_k, may_drop=plan.may_drop)
        return (Part(rows_ND, plan.index.expert_offsets, RowWeights(plan.weights_TK, plan.index.perm_N)),)

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> tuple[Tensor, ...]:
        """They are here."""
        return (rows,)

    def combine(self, rows: list[Tensor], plan: PermutePlan, weighted: bool = False) -> Tensor:
        """Weighted sum of a token's K rows."""
        [rows_ND] = rows
        if weighted:
            return sum_rows(rows_ND, plan.index, self.top_k, may_drop=plan.may_drop)
        return unpermute(rows_ND, plan.weights_TK, plan.index, may_drop=plan.may_drop)


class MaskedDispatcher:
    """One device, nothing moves: (T, D) -> (E, T, D), a view -> (T, D)."""

    carries_weights = False
    expert_groups = parts = ranks = 1

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def plan(self, selection: Selection) -> MaskedPlan:
        """Spread the weights over the mask."""
        ids_TK = selection.expert_ids_TK.long()
        mask_TE = selection.weights_TK.new_zeros(ids_TK.shape[0], self.num_experts)
        # A dropped slot (id -1) adds its weight 0 to expert 0.
        return MaskedPlan(mask_TE.scatter_add(1, ids_TK.clamp(min=0), selection.weights_TK))

    def dispatch(self, x_TD: Tensor, plan: MaskedPlan) -> Iterable[Part]:
        """A view."""
        return (Part(x_TD.expand(self.num_experts, *x_TD.shape), None),)

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> tuple[Tensor, ...]:
        """They are here."""
        return (rows,)

    def combine(self, rows: list[Tensor], plan: MaskedPlan, weighted: bool = False) -> Tensor:
        """Sum over experts, each row scaled by its entry of the mask; fp32 accumulation."""
        [rows_ETD] = rows
        with torch.autocast(rows_ETD.device.type, enabled=False):  # it would round the weights
            dtype = sum_dtype(rows_ETD.dtype)
            return torch.einsum("etd,te->td", rows_ETD.to(dtype), plan.mask_TE.to(dtype)).to(rows_ETD.dtype)


def local_dispatcher(movement: str, num_experts: int, top_k: int, may_drop: bool) -> Dispatcher[Any]:
    """The one-device dispatcher for a router's `movement`."""
    if movement == "permute":
        return PermuteDispatcher(num_experts, top_k, may_drop)
    if movement == "masked":
        return MaskedDispatcher(num_experts)
    raise ValueError(f"dispatch: movement must be 'permute' or 'masked', got {movement!r}; fix Router.movement")
