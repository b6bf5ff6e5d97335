"""How rows reach the experts and come back. A dispatcher is no module: it owns no weights.

Legend: T tokens, K top_k, N = T * K slots, E experts, D d_model.
`plan` returns a frozen plan that `dispatch` and `combine` take; local and parallel dispatchers share this interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe_lightning.ops import RoutingIndex, RowWeights, Selection, build_index, permute, sum_rows, unpermute


@dataclass(frozen=True)
class PermutePlan:
    """Rows sorted by expert: expert e owns rows [expert_offsets[e], expert_offsets[e + 1])."""

    index: RoutingIndex
    weights_TK: Tensor
    may_drop: bool

    @property
    def expert_offsets(self) -> Tensor:
        """int32 (E + 1)."""
        return self.index.expert_offsets

    @property
    def row_weights(self) -> RowWeights:
        """The combine weights, for experts that fold them in."""
        return RowWeights(self.weights_TK, self.index.perm_N)


@dataclass(frozen=True)
class MaskedPlan:
    """Every expert sees every row; the mask holds a token's weight for each expert, 0 where it was not chosen."""

    mask_TE: Tensor

    @property
    def expert_offsets(self) -> None:
        """No rows were sorted, so there are no offsets."""
        return

    @property
    def row_weights(self) -> None:
        """A row is of all tokens: it has no weight of its own."""
        return


Plan = TypeVar("Plan", PermutePlan, MaskedPlan)


class Dispatcher(Protocol[Plan]):
    """The interface of local and parallel movement."""

    def plan(self, selection: Selection) -> Plan:
        """Where each slot goes (T_index)."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Bring tokens (T, D) to their experts (T_permute)."""

    def combine(self, rows: Tensor, plan: Plan, weighted: bool = False) -> Tensor:
        """Bring the experts' rows back as weighted sums (T, D) (T_unpack); `weighted`: they carry their weights."""


class PermuteDispatcher:
    """One device, rows sorted by expert: (T, D) -> (N, D) -> (T, D)."""

    def __init__(self, num_experts: int, top_k: int, may_drop: bool) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.may_drop = may_drop

    def plan(self, selection: Selection) -> PermutePlan:
        """Sort the slots by expert."""
        index = build_index(selection.expert_ids_TK, self.num_experts)
        return PermutePlan(index, selection.weights_TK, self.may_drop)

    def dispatch(self, x_TD: Tensor, plan: PermutePlan) -> Tensor:
        """Gather the rows in that order."""
        return permute(x_TD, plan.index, self.top_k, may_drop=plan.may_drop)

    def combine(self, rows: Tensor, plan: PermutePlan, weighted: bool = False) -> Tensor:
        """Weighted sum of a token's K rows."""
        if weighted:
            return sum_rows(rows, plan.index, self.top_k, may_drop=plan.may_drop)
        return unpermute(rows, plan.weights_TK, plan.index, may_drop=plan.may_drop)


class MaskedDispatcher:
    """One device, nothing moves: (T, D) -> (E, T, D), a view -> (T, D)."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def plan(self, selection: Selection) -> MaskedPlan:
        """Spread the weights over the mask."""
        ids_TK = selection.expert_ids_TK.long()
        mask_TE = selection.weights_TK.new_zeros(ids_TK.shape[0], self.num_experts)
        # A dropped slot (id -1) adds its weight 0 to expert 0.
        return MaskedPlan(mask_TE.scatter_add(1, ids_TK.clamp(min=0), selection.weights_TK))

    def dispatch(self, x_TD: Tensor, plan: MaskedPlan) -> Tensor:
        """A view."""
        return x_TD.expand(self.num_experts, *x_TD.shape)

    def combine(self, rows: Tensor, plan: MaskedPlan, weighted: bool = False) -> Tensor:
        """Sum over experts, each row scaled by its entry of the mask; fp32 accumulation."""
        with torch.autocast(rows.device.type, enabled=False):  # it would round the weights
            return torch.einsum("etd,te->td", rows.float(), plan.mask_TE.float()).to(rows.dtype)


def local_dispatcher(movement: str, num_experts: int, top_k: int, may_drop: bool) -> Dispatcher[Any]:
    """The one-device dispatcher for a router's `movement`."""
    if movement == "permute":
        return PermuteDispatcher(num_experts, top_k, may_drop)
    if movement == "masked":
        return MaskedDispatcher(num_experts)
    raise ValueError(f"dispatch: movement must be 'permute' or 'masked', got {movement!r}; fix Router.movement")
