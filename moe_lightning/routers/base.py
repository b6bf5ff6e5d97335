"""The router contract: gate, then select.

Legend: T tokens, D d_model, E experts, K top_k; a suffix spells the shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.ops import Selection
from moe_lightning.routers.gate import linear_fp32
from moe_lightning.utils.checks import check_sizes


class Tokens(NamedTuple):
    """What a router may know of the tokens beside their hidden states."""

    ids_T: Tensor | None = None
    """Of the vocabulary."""
    mask_T: Tensor | None = None
    """bool, False for padding: in no load, loss or balance. None: all are tokens."""
    seq_len: int | None = None
    """S, where tokens are of sequences of this length, one behind the other."""


NO_TOKENS = Tokens()


class Routing(NamedTuple):
    """What one MoE layer decided for one batch: all that losses, metrics and callbacks may look at."""

    logits_TE: Tensor
    selection: Selection
    tokens: Tokens = NO_TOKENS


class ChoiceHook(ABC):
    """What stands between a router's logits and its choice, see `replay`."""

    @abstractmethod
    def select(self, router: Router, logits_TE: Tensor, tokens: Tokens) -> Selection:
        """In place of `router.select_experts`."""


class Router(nn.Module, ABC):
    """Scores every expert for every token (`gate`) and picks `top_k` of them (`select`).

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts a token is sent to.
        skew_experts: synthetic skew of the benchmarks: this many first experts get `skew_bias` on their logits.
        skew_bias: the bias, in logits.
        capacity_factor: in training an expert takes at most ceil(capacity_factor * T * K / E) slots, those with
            the highest weights; the others are dropped (id -1, weight 0). Evaluation drops nothing: there a token
            must not depend on its neighbours. None: no limit.
        fp32_logits: compute the gate in fp32 even under autocast (Switch Transformer's selective precision,
            arXiv:2101.03961, section 2.4).
        gate_bias: add a trained bias to the logits (gpt-oss).
        skip_masked: send padding to no expert, which saves its time; else it is computed like tokens.

    A subclass implements `select_experts`. The contract every router keeps: logit descending, then expert id ascending;
    ids distinct and in [0, E) for any input bits; a row with NaN or +inf, or with fewer than K experts above -inf,
    gets NaN weights and is counted in `Selection.invalid_rows`; deterministic; no host synchronisation.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    bias: nn.Parameter | None
    skew_E: Tensor
    #: How rows reach the experts: "permute" sorts them by expert, "masked" lets every expert see every row.
    dispatch_mode: ClassVar[Literal["permute", "masked"]] = "permute"
    #: Whether `select_experts` itself may return dropped slots (id -1, weight 0); a capacity factor drops in any case.
    may_drop: ClassVar[bool] = False

    #: While choices are recorded or replayed.
    choice_hook: ChoiceHook | None = None
    #: Whether `select_experts` reads `Tokens.ids_T`.
    needs_token_ids: ClassVar[bool] = False
    #: Whether a token's experts depend on other tokens, those behind it too, in evaluation as well.
    looks_ahead: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        skew_experts: int = 0,
        skew_bias: float = 0.0,
        capacity_factor: float | None = None,
        fp32_logits: bool = True,
        gate_bias: bool = False,
        skip_masked: bool = False,
    ) -> None:
        super().__init__()
        check_router_arguments(d_model, num_experts, top_k, skew_experts, skew_bias, capacity_factor)
        self.d_model = d_model
        self.num_experts = num_experts
        self.top_k = top_k
        self.skew_experts = skew_experts
        self.capacity_factor = capacity_factor
        self.fp32_logits = fp32_logits
        self.skip_masked = skip_masked
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if gate_bias else None)
        skew_E = torch.zeros(num_experts)
        skew_E[:skew_experts] = skew_bias
        # Not in the checkpoint: the skew is an experiment's setting, not something learnt.
        self.register_buffer("skew_E", skew_E, persistent=False)
        self.reset_parameters()

    @property
    def slots(self) -> int:
        """Columns of a selection: the most experts that a token can have. Slots that it does not use are dropped."""
        return self.top_k

    @property
    def drops_tokens(self) -> bool:
        """Whether `select` may return dropped slots."""
        return self.may_drop or self.skip_masked or self.capacity_factor is not None

    def reset_parameters(self) -> None:
        """Draw the gate's weight from N(0, 0.02); its bias is 0."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def gate(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) of tokens (T, D); fp32 (fp64 for fp64) if `fp32_logits`."""
        linear = linear_fp32 if self.fp32_logits else nn.functional.linear
        logits_TE = linear(x_TD, self.weight)
        if self.bias is not None:
            logits_TE = logits_TE + self.bias.to(logits_TE.dtype)
        return logits_TE + self.skew_E.to(logits_TE.dtype) if self.skew_experts else logits_TE

    def select(self, logits_TE: Tensor, tokens: Tokens = NO_TOKENS) -> Selection:
        """Weights, ids and load of the experts chosen for logits (T, E)."""
        hook = self.choice_hook
        selection = self.select_experts(logits_TE, tokens) if hook is None else hook.select(self, logits_TE, tokens)
        mask_T = tokens.mask_T
        if self.capacity_factor is not None and self.training:
            selection = drop_over_capacity(selection, self.capacity_factor, self.top_k, mask_T)
        if mask_T is not None and self.skip_masked:
            padding_T1 = ~mask_T[:, None]
            selection = selection._replace(
                weights_TK=selection.weights_TK.masked_fill(padding_T1, 0.0),
                expert_ids_TK=selection.expert_ids_TK.masked_fill(padding_T1, -1),
            )
        return selection

    def ranking_scores(self, logits_TE: Tensor) -> Tensor:
        """What orders the experts of each token in evaluation, up to rounding (T, E)."""
        return logits_TE

    def cutoffs(self) -> Tensor | None:
        """The score (E) above which an expert takes a token in evaluation; None where a token has its K best."""
        return None

    @abstractmethod
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        """Select experts per row of logits (T, E), in `slots` columns, padding too, before any capacity limit.

        The load is of the tokens that the mask keeps: give it to `ops.select`.
        """

    def select_given(self, logits_TE: Tensor, ids_TK: Tensor, tokens: Tokens) -> Selection:
        """The selection of these experts, with the weights that the logits give them.

        Raises:
            ValueError: the router's weights are not of the ids and logits alone.
        """
        raise ValueError(
            f"replay: {type(self).__name__} makes its weights with its choice; replay a router that does not"
        )

    @override
    def forward(self, x_TD: Tensor, tokens: Tokens = NO_TOKENS) -> Routing:
        """Gate and select in one call, for use outside an MoE layer."""
        logits_TE = self.gate(x_TD)
        return Routing(logits_TE, self.select(logits_TE, tokens), tokens)

    @override
    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


def drop_over_capacity(
    selection: Selection, capacity_factor: float, top_k: int, mask_T: Tensor | None = None
) -> Selection:
    """Mark slots beyond ceil(capacity_factor * T * K / E) of an expert as dropped (id -1, weight 0).

    GShard (arXiv:2006.16668) and Switch (arXiv:2101.03961) drop by position in the batch; dropping the lowest
    weights, as V-MoE's batch-prioritised routing does (arXiv:2106.05974), loses less.

    The order within an expert is weight descending, then slot ascending. `tokens_per_expert_E` becomes the load
    after the drop. Weights are not renormalised. Deterministic, no host synchronisation. Padding, where `mask_T` is
    False, is no part of T, takes no slot of tokens, and keeps its own. Slots that are dropped already stay so.
    """
    tokens, slots = selection.expert_ids_TK.shape
    num_experts = selection.tokens_per_expert_E.numel()
    # An expert never gets more than one slot per token; the bound also keeps a huge factor an int. The last digits of
    # a float product do not make a slot.
    share = min(capacity_factor * top_k / num_experts, 1.0)
    ids_N = selection.expert_ids_TK.flatten().long()
    ids_N = ids_N.masked_fill(ids_N < 0, num_experts)  # behind all experts
    if mask_T is None:
        capacity: int | Tensor = math.ceil(share * tokens - 1e-6)
    else:
        capacity = (share * mask_T.sum().double() - 1e-6).ceil().long()
        ids_N = ids_N.masked_fill(~mask_T.repeat_interleave(slots), num_experts)

    by_weight_N = selection.weights_TK.detach().flatten().argsort(descending=True, stable=True)
    by_expert_N = by_weight_N[ids_N[by_weight_N].argsort(stable=True)]
    load_E = selection.tokens_per_expert_E.long()
    first_E = torch.cat([load_E.cumsum(0) - load_E, load_E.sum().view(1)])
    position_N = torch.empty_like(ids_N)
    position_N[by_expert_N] = torch.arange(ids_N.numel(), device=ids_N.device) - first_E[ids_N[by_expert_N]]
    position_N = position_N.masked_fill(ids_N == num_experts, -1)

    kept_TK = (position_N < capacity).view(tokens, slots)
    return Selection(
        weights_TK=selection.weights_TK.masked_fill(~kept_TK, 0.0),
        expert_ids_TK=selection.expert_ids_TK.masked_fill(~kept_TK, -1),
        tokens_per_expert_E=load_E.clamp(max=capacity).int(),
        invalid_rows=selection.invalid_rows,
    )


def order_of(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Scores (T, E) that choose these experts, in their order."""
    tokens, top_k = ids_TK.shape
    rank_TK = torch.arange(top_k, 0, -1, device=ids_TK.device, dtype=torch.float32).expand(tokens, top_k)
    lowest_TE = torch.full((tokens, num_experts), -torch.inf, device=ids_TK.device)
    return lowest_TE.scatter(1, ids_TK.long(), rank_TK)


def check_router_arguments(
    d_model: int,
    num_experts: int,
    top_k: int,
    skew_experts: int,
    skew_bias: float,
    capacity_factor: float | None,
) -> None:
    """Raise ValueError, naming the argument, if one is out of range."""
    check_sizes("router", d_model=d_model, num_experts=num_experts)
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"router: top_k must be in [1, num_experts], got top_k={top_k}, num_experts={num_experts}; "
            "lower top_k or add experts"
        )
    if not 0 <= skew_experts <= num_experts:
        raise ValueError(
            f"router: skew_experts must be in [0, num_experts], got skew_experts={skew_experts}, "
            f"num_experts={num_experts}"
        )
    if not abs(skew_bias) <= torch.finfo(torch.float32).max:
        raise ValueError(f"router: skew_bias must be finite in fp32, got skew_bias={skew_bias}")
    if capacity_factor is not None and not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(
            f"router: capacity_factor must be positive and finite, got capacity_factor={capacity_factor}; "
            "null means no limit"
        )
