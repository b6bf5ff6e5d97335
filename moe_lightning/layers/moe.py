"""The MoE layer, one straight line: gate, select, plan, dispatch, experts, combine.

Legend: T tokens, D d_model, E experts, K top_k, N = T * K.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_lightning.layers.dispatch import Dispatcher, MaskedDispatcher, local_dispatcher
from moe_lightning.layers.experts import Experts
from moe_lightning.layers.phases import Mark, Phase, no_mark
from moe_lightning.layers.precision import compute_dtype
from moe_lightning.routers import Router, Routing
from moe_lightning.utils.checks import check_sizes

Chunks = int | Literal["auto"]


class MoE(nn.Module):
    """A router, a dispatcher and the experts.

    Args:
        router: chooses experts and weights.
        experts: computes the rows.
        dispatcher: moves the rows; by default the one-device dispatcher for the router's `movement`.
        overlap_chunks: where rows travel between ranks, in how many chunks: the experts work on one while others are on
            their way; "auto": by how fast the ranks reach each other.

    `mark` is the seat of a timer: see `phases`.
    """

    def __init__(
        self, router: Router, experts: Experts, dispatcher: Dispatcher[Any] | None = None, overlap_chunks: Chunks = 1
    ) -> None:
        super().__init__()
        if overlap_chunks != "auto":
            check_sizes("moe", overlap_chunks=overlap_chunks)
        self.overlap_chunks = overlap_chunks
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher or local_dispatcher(
            router.movement, router.num_experts, router.top_k, router.select_may_drop
        )
        self.mark: Mark = no_mark

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(..., D) -> (..., D), and what was decided on the way."""
        x_TD = x.reshape(-1, x.shape[-1])
        self.mark(Phase.LOGIT, x_TD)
        logits_TE = self.router.gate(x_TD)
        self.mark(Phase.SELECT, logits_TE)
        selection = self.router.select(logits_TE)
        self.mark(Phase.INDEX, selection.weights_TK)
        plan = self.dispatcher.plan(selection)
        self.mark(Phase.PERMUTE)
        x_TD = x_TD.to(compute_dtype(x_TD))  # half the bytes to move under autocast
        fold = self.dispatcher.carries_weights and self.experts.takes_weights(x_TD)
        rows: list[Tensor] = []
        for part in self.dispatcher.dispatch(x_TD, plan):
            if not rows:
                self.mark(Phase.EXPERTS, part.rows)
                groups = self.experts.groups(part.rows, self.dispatcher.expert_groups, self.dispatcher.parts)
            weights = part.row_weights if fold else None
            done = self.experts(part.rows, part.expert_offsets, weights, part.buffer, groups[part.group])
            rows += self.dispatcher.send_back(done, part, weighted=fold)
        self.mark(Phase.UNPACK, done)
        y_TD = self.dispatcher.combine(rows, plan, weighted=fold)
        self.mark(Phase.DONE, y_TD)
        return y_TD.view_as(x), Routing(logits_TE, selection)

    def computed_by(self, dtype: torch.dtype, device: torch.device) -> str:
        """What computes the experts for such rows: bmm where every expert sees every row, else as `Experts.choose`."""
        return "bmm" if isinstance(self.dispatcher, MaskedDispatcher) else self.experts.choose(dtype, device)

    @property
    def idle_weights(self) -> int:
        """Weights of the E - K experts that a token does not meet."""
        experts = sum(p.numel() for p in self.experts.parameters())
        return experts * (self.router.num_experts - self.router.top_k) // self.router.num_experts
