"""How rows reach the experts and come back. A dispatcher is no module: it owns no weights.

Legend: T tokens, K top_k, N = T * K slots, E experts, D d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.layers.experts import compute_dtype
from moe_lightning.layers.phases import Hook, Phase, no_hook, run_step
from moe_lightning.ops import Gathered, RoutingIndex, RowWeights, Selection, build_index, permute, sum_rows, unpermute
from moe_lightning.ops.library import accum_dtype

if TYPE_CHECKING:
    from moe_lightning.layers.experts import Experts


class Dispatched(NamedTuple):
    """Rows for the experts: plain data."""

    rows: Tensor
    """(N, D) sorted by expert, or (E, T, D)."""
    expert_offsets: Tensor | None
    """int32 (E + 1); None where every expert sees every row."""
    row_weights: RowWeights | None
    """The combine weights of the rows, for experts that fuse them; None: `combine` applies them."""
    handle: Any
    """What `combine` needs to know of the way back: tensors and numbers."""


class Dispatcher(ABC):
    """The interface of dispatchers on one device and across ranks.

    A pass is ``index -> permute -> experts -> combine``.
    """

    ranks: int = 1
    """Over how many the experts are spread."""

    @abstractmethod
    def index(self, selection: Selection) -> Any:
        """Where each slot goes (T_index): a handle for `permute`."""

    @abstractmethod
    def permute(self, x_TD: Tensor, handle: Any) -> Dispatched:
        """Bring tokens (T, D) to their experts (T_permute)."""

    @abstractmethod
    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums (T, D) of a token's rows as the experts return them (T_unpack); weighted, unless the experts did it."""

    def dispatch(self, x_TD: Tensor, selection: Selection, hook: Hook = no_hook) -> Dispatched:
        """`index` and `permute`."""
        handle = run_step(hook, Phase.INDEX, selection.weights_TK, self.index, selection)
        return run_step(hook, Phase.PERMUTE, None, self.permute, x_TD, handle)

    def run(self, experts: Experts, x_TD: Tensor, selection: Selection, hook: Hook = no_hook) -> Tensor:
        """From a selection to the output of the layer, (T, D) -> (T, D)."""
        dispatched = self.dispatch(x_TD, selection, hook)
        if dispatched.row_weights is not None and not experts.fuses_weights(dispatched.rows):
            dispatched = dispatched._replace(row_weights=None)
        rows, offsets, weights, _ = dispatched
        rows = run_step(hook, Phase.EXPERTS, rows, experts, rows, offsets, weights)
        return run_step(hook, Phase.UNPACK, rows, self.combine, rows, dispatched)


class PermuteHandle(NamedTuple):
    """Rows sorted by expert: expert e owns rows [expert_offsets[e], expert_offsets[e + 1])."""

    routing_index: RoutingIndex
    weights_TK: Tensor


class PermuteDispatcher(Dispatcher):
    """One device, rows sorted by expert: (T, D) -> (N, D) -> (T, D)."""

    def __init__(self, num_experts: int, top_k: int, may_drop: bool) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.may_drop = may_drop

    @override
    def index(self, selection: Selection) -> PermuteHandle:
        return PermuteHandle(build_index(selection.expert_ids_TK, self.num_experts), selection.weights_TK)

    @override
    def permute(self, x_TD: Tensor, handle: PermuteHandle) -> Dispatched:
        x_TD = x_TD.to(compute_dtype(x_TD))  # half the bytes to move under autocast
        rows_ND = permute(x_TD, handle.routing_index, self.top_k, may_drop=self.may_drop)
        gathered = Gathered(x_TD, handle.routing_index, self.top_k)
        row_weights = RowWeights(handle.weights_TK, handle.routing_index.perm_N, gathered)
        return Dispatched(rows_ND, handle.routing_index.expert_offsets, row_weights, handle)

    @override
    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        index, weights_TK = dispatched.handle
        if dispatched.row_weights is not None:
            return sum_rows(rows, index, self.top_k, may_drop=self.may_drop)
        return unpermute(rows, weights_TK, index, may_drop=self.may_drop)


class MaskedDispatcher(Dispatcher):
    """One device, nothing moves: (T, D) -> (E, T, D), a view -> (T, D).

    The handle is a mask (T, E) that holds a token's weight for each expert, 0 where it was not chosen.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    @override
    def index(self, selection: Selection) -> Tensor:
        ids_TK = selection.expert_ids_TK.long()
        mask_TE = selection.weights_TK.new_zeros(ids_TK.shape[0], self.num_experts)
        # A dropped slot (id -1) adds its weight 0 to expert 0.
        return mask_TE.scatter_add(1, ids_TK.clamp(min=0), selection.weights_TK)

    @override
    def permute(self, x_TD: Tensor, handle: Tensor) -> Dispatched:
        x_TD = x_TD.to(compute_dtype(x_TD))
        return Dispatched(x_TD.expand(self.num_experts, *x_TD.shape), None, None, handle)

    @override
    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Rows (E, T, D), each scaled by its entry of the mask; fp32 accumulation."""
        with torch.autocast(rows.device.type, enabled=False):  # it would round the weights
            dtype = accum_dtype(rows.dtype)
            return torch.einsum("etd,te->td", rows.to(dtype), dispatched.handle.to(dtype)).to(rows.dtype)


def local_dispatcher(mode: str, num_experts: int, top_k: int, may_drop: bool) -> Dispatcher:
    """The one-device dispatcher for a router's `dispatch_mode`."""
    if mode == "permute":
        return PermuteDispatcher(num_experts, top_k, may_drop)
    if mode == "masked":
        return MaskedDispatcher(num_experts)
    raise ValueError(f"dispatch: dispatch_mode must be 'permute' or 'masked', got {mode!r}; fix Router.dispatch_mode")
