"""The MoE layer, one straight line: gate, select, dispatch, experts, combine.

Legend: T tokens, D d_model, E experts, Z zero experts, K top_k.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.layers.dispatch import Dispatcher, MaskedDispatcher, local_dispatcher
from moe_lightning.layers.experts import Experts
from moe_lightning.layers.phases import Hook, Phase, Step, StepRecorder, no_hook, run_step
from moe_lightning.layers.recompute import in_backward, recompute, select_once
from moe_lightning.layers.shared_experts import SharedExperts, add_unrouted, without_zero_experts
from moe_lightning.ops import Selection
from moe_lightning.routers import NO_TOKENS, Router, Routing, Tokens
from moe_lightning.utils.checks import check_sizes

Chunks = int | Literal["auto"]


class MoE(nn.Module):
    """A router, a dispatcher and the experts.

    Args:
        router: chooses experts and weights, among E + Z.
        experts: computes the rows of the first E of these.
        dispatcher: moves the rows; by default the one-device dispatcher for the router's `dispatch_mode`.
        overlap_chunks: where rows travel between ranks, in how many chunks: the experts work on one while others are on
            their way; "auto": by how fast the ranks reach each other.
        recompute: keep tokens and routing for backward, and dispatch and compute the experts again there.
        shared: computes every token.
        n_zero_experts: Z, the router's last experts, which return the token itself.

    `hook` is called as each phase begins, see `phases`; not in a pass that backward repeats. No phase holds shared and
    zero experts.

    Raises:
        ValueError: overlap_chunks below 1, or no expert that computes.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher | None = None,
        overlap_chunks: Chunks = 1,
        recompute: bool = False,
        shared: SharedExperts | None = None,
        n_zero_experts: int = 0,
    ) -> None:
        super().__init__()
        if overlap_chunks != "auto":
            check_sizes("moe", overlap_chunks=overlap_chunks)
        self.overlap_chunks, self.recompute = overlap_chunks, recompute
        self.router = router
        self.experts = experts
        check_sizes("moe", num_experts=router.num_experts - n_zero_experts)
        self.num_experts, self.n_zero_experts = router.num_experts - n_zero_experts, n_zero_experts
        self.shared = shared
        self.dispatcher = dispatcher or local_dispatcher(
            router.dispatch_mode, self.num_experts, router.slots, self.drops_tokens
        )
        self.hook: Hook = no_hook

    @override
    def forward(self, x: Tensor, tokens: Tokens = NO_TOKENS) -> tuple[Tensor, Routing]:
        """(..., D) -> (..., D), and the routing of its tokens."""
        x_TD = x.reshape(-1, x.shape[-1])
        hook = self._hook_of_pass()
        routing = self.route(x_TD, hook, tokens)
        selection = self.of_experts(routing.selection)
        if self.recompute:
            y_TD = recompute(self._dispatch_and_combine, x_TD, *selection)
        else:
            y_TD = self.dispatcher.run(self.experts, x_TD, selection, hook)
        hook(Phase.DONE, y_TD)
        return add_unrouted(y_TD, x_TD, routing.selection, self.num_experts, self.shared).view_as(x), routing

    def of_experts(self, selection: Selection) -> Selection:
        """What of a selection is dispatched: all but the choices of zero experts."""
        return without_zero_experts(selection, self.num_experts) if self.n_zero_experts else selection

    @property
    def drops_tokens(self) -> bool:
        """Whether what is dispatched may have dropped slots."""
        return self.router.drops_tokens or self.n_zero_experts > 0

    def _hook_of_pass(self) -> Hook:
        return no_hook if self.hook is no_hook or in_backward() else self.hook

    def _dispatch_and_combine(self, x_TD: Tensor, *selection: Tensor) -> Tensor:
        return self.dispatcher.run(self.experts, x_TD, Selection(*selection), self._hook_of_pass())

    def route(self, x_TD: Tensor, hook: Hook = no_hook, tokens: Tokens = NO_TOKENS) -> Routing:
        """Gate and select, of tokens (T, D)."""
        logits_TE = run_step(hook, Phase.LOGIT, x_TD, self.router.gate, x_TD)
        selection = select_once(lambda: run_step(hook, Phase.SELECT, logits_TE, self.router.select, logits_TE, tokens))
        return Routing(logits_TE, selection, tokens)

    def steps(self, x_TD: Tensor) -> dict[Phase, Step]:
        """The calls of a forward pass over tokens (T, D), as it made them.

        The inputs of each but the first are the outputs of those before, with their graphs.
        """
        steps = StepRecorder()
        self.dispatcher.run(self.experts, x_TD, self.of_experts(self.route(x_TD, steps).selection), steps)
        return steps

    def computed_by(self, dtype: torch.dtype, device: torch.device) -> str:
        """What computes such rows: bmm where every expert sees every row, else as `Experts.implementation_for`."""
        masked = isinstance(self.dispatcher, MaskedDispatcher)
        return "bmm" if masked else self.experts.implementation_for(dtype, device)

    @property
    def inactive_parameters(self) -> int:
        """Weights of experts that a token is not sent to, where zero experts are chosen as often as others.

        K on average, where the number of a token's experts varies.
        """
        experts = sum(p.numel() for p in self.experts.parameters())
        return experts * (self.router.num_experts - self.router.top_k) // self.router.num_experts
