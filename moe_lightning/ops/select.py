"""Top-k selection: ids, weights, load and the invalid-row count from router logits, in one call.

Shapes: T tokens, E experts, K = top_k.

Order: score descending, then expert id ascending; -0 equals +0; NaN counts as -inf. For any input bits the ids of a
row are in [0, E) and distinct. Arithmetic is fp32 (fp64 for fp64 logits). A row is invalid when its scores hold a
NaN or a +inf, or has fewer than K experts above -inf: its weights are NaN, its ids stay legal, and
``invalid_rows`` counts it. Nothing here waits for the device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops import native
from moe_lightning.ops.library import accum_dtype, check_same_device, is_plain, register
from moe_lightning.utils.checks import check_choice


class Selection(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    weights_TK: Tensor
    """fp32 (fp64 for fp64 logits); a renormalised row sums to 1; NaN in invalid rows."""
    expert_ids_TK: Tensor
    """int32, best first."""
    tokens_per_expert_E: Tensor
    """int32 counts of the ids; they sum to T * K."""
    invalid_rows: Tensor
    """int32 scalar on the device."""


class Rule(NamedTuple):
    """How experts are selected and weighted: the options of `select`, in its order."""

    score: str = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    bias_E: Tensor | None = None
    scores_TE: Tensor | None = None
    n_group: int = 1
    topk_group: int = 1
    mask_T: Tensor | None = None
    gap_counts_BE: Tensor | None = None

    @property
    def by_scores(self) -> bool:
        """Whether experts are ordered by scores; else by the logits, which order them alike."""
        return self.bias_E is not None or self.grouped or self.gap_counts_BE is not None

    @property
    def grouped(self) -> bool:
        """Whether a token's experts come from some of the groups alone."""
        return self.topk_group < self.n_group


SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
"""In the order of their codes in ``kernels/include/select.h``."""
#: Of how many experts of a group the scores are added to rank it.
GROUP_EXPERTS = 2
#: Below, softplus is the exponential function, in fp32.
_SOFTPLUS_IS_EXP = -17.0
#: Bins of gaps, half of them on either side of 0, four to each doubling of \|gap\| + `_GAP_OFFSET`.
GAP_BINS = 64
_GAP_OFFSET = 2.0**-7
_GAP_SHIFT = 21


# ---- torch reference -------------------------------------------------------------------------------------
def expert_scores(logits_TE: Tensor, score: str) -> Tensor:
    """The score of every expert, in the type of the arithmetic: softmax, sigmoid, or the root of softplus."""
    wide_TE = logits_TE.to(accum_dtype(logits_TE.dtype))
    return torch.softmax(wide_TE, dim=1) if score == "softmax" else _own_score(wide_TE, score)


def _own_score(wide: Tensor, score: str) -> Tensor:
    """Of logits each by itself."""
    if score == "sigmoid":
        return wide.sigmoid()
    # Apart where softplus is tiny: its root has a gradient of 0 / 0 there.
    low = wide < _SOFTPLUS_IS_EXP
    root = torch.nn.functional.softplus(wide.masked_fill(low, 0.0)).sqrt()
    return torch.where(low, (0.5 * wide.clamp(max=0.0)).exp(), root)


def _ranking_scores(logits_TE: Tensor, rule: Rule) -> Tensor:
    """What experts are selected by, without gradient."""
    logits_TE = logits_TE.detach()
    if rule.scores_TE is not None:
        scores_TE = finite_or_logit(rule.scores_TE, logits_TE)
    elif rule.by_scores:
        scores_TE = expert_scores(logits_TE, rule.score)
        scores_TE = finite_or_logit(scores_TE if rule.bias_E is None else scores_TE + rule.bias_E, logits_TE)
    else:
        return logits_TE
    return _best_groups(scores_TE, rule.n_group, rule.topk_group) if rule.grouped else scores_TE


def finite_or_logit(scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
    """The score of a finite logit; else the logit: a mask stays one, and NaN and +inf show."""
    wide_TE = logits_TE.to(accum_dtype(logits_TE.dtype))
    return torch.where(logits_TE.isfinite(), scores_TE.to(wide_TE.dtype), wide_TE)


def _best_groups(scores_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """The scores, -inf outside of the groups whose best experts have the highest sums; of equal ones the first."""
    groups_TGE = torch.where(scores_TE.isnan(), -torch.inf, scores_TE).unflatten(1, (n_group, -1))
    sums_TG = groups_TGE.topk(min(GROUP_EXPERTS, groups_TGE.shape[2]), dim=2).values.sum(2)
    sums_TG = torch.where(sums_TG.isnan(), -torch.inf, sums_TG) + 0.0
    best = sums_TG.sort(dim=1, descending=True, stable=True).indices[:, :topk_group]
    kept_TG = torch.zeros_like(sums_TG, dtype=torch.bool).scatter(1, best, True)
    lost_TE = ~kept_TG.repeat_interleave(groups_TGE.shape[2], dim=1)
    return scores_TE.masked_fill(lost_TE & scores_TE.isfinite(), -torch.inf)


def _reference(logits_TE: Tensor, top_k: int, rule: Rule) -> Selection:
    scores_TE = _ranking_scores(logits_TE, rule)
    # + 0.0 turns -0 into +0: a radix sort tells them apart.
    sortable_TE = torch.where(scores_TE.isnan(), -torch.inf, scores_TE) + 0.0
    order_TE = sortable_TE.sort(dim=1, descending=True, stable=True).indices
    ids_TK = order_TE[:, :top_k].int().contiguous()
    above_T = (scores_TE > -torch.inf).sum(1)  # NaN is not above
    bad_T = (scores_TE.isnan() | (scores_TE == torch.inf)).any(1) | (above_T < top_k)

    # Added, not filled in, so that the gradient of an invalid row is NaN as well.
    wide_TE = logits_TE.to(accum_dtype(logits_TE.dtype)) + torch.where(bad_T, torch.nan, 0.0)[:, None]
    weights_TK = _weights(wide_TE, ids_TK, rule.score, rule.renormalize)
    if rule.scaling_factor != 1.0:
        weights_TK = weights_TK * rule.scaling_factor
    counts_E = _counts(ids_TK, logits_TE.shape[1], torch.ones_like(ids_TK))
    selection = Selection(weights_TK, ids_TK, counts_E, bad_T.sum(dtype=torch.int32))
    if rule.gap_counts_BE is not None:
        cutoff_T1 = scores_TE.gather(1, order_TE[:, top_k : top_k + 1])
        counted_T = ~bad_T if rule.mask_T is None else ~bad_T & rule.mask_T
        each_TE = counted_T[:, None].expand_as(scores_TE).float()
        rule.gap_counts_BE.scatter_add_(0, _gap_bins((cutoff_T1 - scores_TE).float()), each_TE)
    return selection if rule.mask_T is None else of_real_tokens(selection, rule.mask_T)


def _gap_bins(gaps: Tensor) -> Tensor:
    first = torch.tensor(_GAP_OFFSET).view(torch.int32) >> _GAP_SHIFT
    distance = ((gaps.abs() + _GAP_OFFSET).view(torch.int32) >> _GAP_SHIFT) - first.to(gaps.device)
    side = distance.clamp(max=GAP_BINS // 2 - 1).long()
    return torch.where(gaps < 0, GAP_BINS // 2 - 1 - side, GAP_BINS // 2 + side)


def gap_edges(device: torch.device) -> Tensor:
    """Where the bins of gaps begin and the last one ends, fp32 (B + 1)."""
    steps = torch.arange(GAP_BINS // 2 + 1, device=device)
    side = _GAP_OFFSET * (2.0 ** (steps // 4) * (1 + steps % 4 / 4) - 1)
    return torch.cat([-side[1:].flip(0), side])


def _weights(wide_TE: Tensor, ids_TK: Tensor, score: str, renormalize: bool) -> Tensor:
    selected_TK = wide_TE.gather(1, ids_TK.long())
    if score == "softmax":
        if renormalize:
            return torch.softmax(selected_TK, dim=1)
        return torch.softmax(wide_TE, dim=1).gather(1, ids_TK.long())
    weights_TK = _own_score(selected_TK, score)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
    return weights_TK


def _counts(ids_TK: Tensor, num_experts: int, each_TK: Tensor) -> Tensor:
    """Slots of each expert, those that count 1."""
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=ids_TK.device)
    return counts_E.scatter_add(0, ids_TK.reshape(-1).long(), each_TK.reshape(-1).int())


def of_real_tokens(selection: Selection, mask_T: Tensor) -> Selection:
    """The load and invalid rows of tokens that are not padding."""
    ids_TK, real_T = selection.expert_ids_TK, mask_T.view(-1)
    counts_E = _counts(ids_TK.clamp(min=0), selection.tokens_per_expert_E.numel(), real_T[:, None] & (ids_TK >= 0))
    invalid = (selection.weights_TK.detach().isnan().any(1) & real_T).sum(dtype=torch.int32)
    return selection._replace(tokens_per_expert_E=counts_E, invalid_rows=invalid)


# ---- native call -----------------------------------------------------------------------------------------
def _fake(logits_TE: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    return (
        logits_TE.new_empty((tokens, top_k), dtype=accum_dtype(logits_TE.dtype)),
        logits_TE.new_empty((tokens, top_k), dtype=torch.int32),
        logits_TE.new_empty((experts,), dtype=torch.int32),
        logits_TE.new_empty((), dtype=torch.int32),
    )


def _call(
    logits_TE: Tensor,
    top_k: int,
    score: str,
    renormalize: bool,
    scaling_factor: float,
    bias_E: Tensor | None,
    scores_TE: Tensor | None,
    n_group: int,
    topk_group: int,
    mask_T: Tensor | None,
    gap_counts_BE: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    allocate = native.allocator(logits_TE)
    weights_TK = allocate((tokens, top_k), (top_k, 1), accum_dtype(logits_TE.dtype))
    ids_TK = allocate((tokens, top_k), (top_k, 1), torch.int32)
    counts_E = allocate((experts,), (1,), torch.int32)
    invalid = allocate((), (), torch.int32)
    row_stride, column_stride = logits_TE.stride()
    if column_stride != 1:
        logits_TE, row_stride = logits_TE.contiguous(), experts
    bias_E = None if bias_E is None else bias_E.contiguous()
    scores_TE = None if scores_TE is None else scores_TE.contiguous()
    mask_T = None if mask_T is None else mask_T.contiguous()
    native.module(native.kind(logits_TE)).select_forward(
        native.place(logits_TE), logits=logits_TE.data_ptr(), bias=native.pointer(bias_E),
        selection_scores=native.pointer(scores_TE), mask=native.pointer(mask_T), weights=weights_TK.data_ptr(),
        expert_ids=ids_TK.data_ptr(), tokens_per_expert=counts_E.data_ptr(), invalid_rows=invalid.data_ptr(),
        gap_counts=native.pointer(gap_counts_BE), tokens=tokens, experts=experts, top_k=top_k, n_group=n_group,
        topk_group=topk_group, dtype=native.DTYPE_CODES[logits_TE.dtype], score=SCORES.index(score),
        renormalize=renormalize, scaling_factor=scaling_factor, row_stride=row_stride, threads=torch.get_num_threads(),
    )  # fmt: skip
    return weights_TK, ids_TK, counts_E, invalid


def _fake_backward(grad_TK: Tensor, logits_TE: Any, weights_TK: Tensor, *rest: Any) -> Tensor:
    _ids_TK, num_experts, dtype, *_ = rest
    return weights_TK.new_empty((weights_TK.shape[0], num_experts), dtype=dtype)


def _call_backward(
    grad_TK: Tensor,
    logits_TE: Tensor | None,
    weights_TK: Tensor,
    ids_TK: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    score: str,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    tokens, top_k = weights_TK.shape
    grad_logits_TE = weights_TK.new_empty((tokens, num_experts), dtype=dtype)
    if tokens == 0:
        return grad_logits_TE
    if logits_TE is not None and logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    grad_TK = grad_TK.contiguous()
    native.module(native.kind(grad_TK)).select_backward(
        native.place(grad_TK), logits=native.pointer(logits_TE), grad_weights=grad_TK.data_ptr(),
        weights=weights_TK.data_ptr(), expert_ids=ids_TK.data_ptr(), grad_logits=grad_logits_TE.data_ptr(),
        tokens=tokens, experts=num_experts, top_k=top_k, dtype=native.DTYPE_CODES[dtype], score=SCORES.index(score),
        renormalize=renormalize, scaling_factor=scaling_factor,
        row_stride=0 if logits_TE is None else logits_TE.stride(0),
    )  # fmt: skip
    return grad_logits_TE


# ---- fake and registration -------------------------------------------------------------------------------
_ARGUMENTS = (
    "Tensor logits_TE, int top_k, str score, bool renormalize, float scaling_factor, Tensor? bias_E, "
    "Tensor? scores_TE, int n_group, int topk_group, Tensor? mask_T"
)
_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"
_forward_op = register(f"select_forward({_ARGUMENTS}) -> {_RESULTS}", _call, _fake)
# Apart, since an operator that changes a tensor cannot be exported.
_count_gaps_op = register(f"select_and_count_gaps({_ARGUMENTS}, Tensor(a!) gap_counts_BE) -> {_RESULTS}", _call, _fake)
_backward_op = register(
    "select_backward(Tensor grad_TK, Tensor? logits_TE, Tensor weights_TK, Tensor ids_TK, int num_experts, "
    "ScalarType dtype, str score, bool renormalize, float scaling_factor) -> Tensor",
    _call_backward,
    _fake_backward,
)


def _forward(logits_TE: Tensor, top_k: int, *rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if is_plain(logits_TE):
        return _call(logits_TE, top_k, *rule)
    *rest, gap_counts_BE = rule
    if gap_counts_BE is None:
        return _forward_op(logits_TE, top_k, *rest)
    return _count_gaps_op(logits_TE, top_k, *rest, gap_counts_BE)


# ---- autograd --------------------------------------------------------------------------------------------
class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int, *rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # or zeros would be made for ids, counts and invalid rows
        weights_TK, ids_TK, counts_E, invalid = _forward(logits_TE, top_k, *rule)
        score, renormalize, scaling_factor, *_ = rule
        weights_are_enough = score == "softmax" and renormalize
        ctx.save_for_backward(None if weights_are_enough else logits_TE, weights_TK, ids_TK)
        ctx.rest = logits_TE.shape[1], logits_TE.dtype, score, renormalize, scaling_factor
        ctx.mark_non_differentiable(ids_TK, counts_E, invalid)
        return weights_TK, ids_TK, counts_E, invalid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        none = (None,) * (1 + len(Rule._fields))
        if grad_TK is None:
            return (None, *none)
        backward = _call_backward if is_plain(grad_TK) else _backward_op
        return (backward(grad_TK, *ctx.saved_tensors, *ctx.rest), *none)


# ---- public ----------------------------------------------------------------------------------------------
def check_groups(component: str, num_experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    """Raise ValueError unless the groups are whole, and those of a token hold K experts."""
    if n_group < 1 or num_experts % n_group:
        raise ValueError(
            f"{component}: n_group must divide num_experts, got n_group={n_group}, num_experts={num_experts}; "
            "1 means no groups"
        )
    if not 1 <= topk_group <= n_group:
        raise ValueError(
            f"{component}: topk_group must be in [1, n_group], got topk_group={topk_group}, n_group={n_group}"
        )
    size = num_experts // n_group
    if topk_group * size < top_k:
        raise ValueError(
            f"{component}: topk_group groups must hold top_k experts, got topk_group={topk_group}, {size} experts in "
            f"each, top_k={top_k}; raise topk_group"
        )


def _validate(logits_TE: Tensor, top_k: int, rule: Rule) -> None:
    tokens, experts = logits_TE.shape
    if logits_TE.dtype not in native.DTYPE_CODES:
        raise ValueError(f"ops.select: logits must be fp64, fp32, fp16 or bf16, got {logits_TE.dtype}; use .float()")
    if not 1 <= top_k <= experts:
        raise ValueError(f"ops.select: top_k must be in [1, num_experts], got top_k={top_k}, num_experts={experts}")
    if rule.score not in SCORES:
        check_choice("ops.select", "score", rule.score, SCORES)
    if rule.n_group != 1 or rule.topk_group != 1:
        check_groups("ops.select", experts, top_k, rule.n_group, rule.topk_group)
    if rule.bias_E is not None and rule.scores_TE is not None:
        raise ValueError("ops.select: bias and scores must not both be given; add the bias to the scores")
    for name, tensor, dtype, shape in (
        ("bias", rule.bias_E, torch.float32, (experts,)),
        ("scores", rule.scores_TE, torch.float32, (tokens, experts)),
        ("mask", rule.mask_T, torch.bool, (tokens,)),
        ("gap_counts", rule.gap_counts_BE, torch.float32, (GAP_BINS, experts)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            kind = str(dtype).removeprefix("torch.").replace("float32", "fp32")
            raise ValueError(
                f"ops.select: {name} must be {kind} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        check_same_device("ops.select", logits=logits_TE, **{name: tensor})
    if rule.gap_counts_BE is not None:
        if top_k == experts or rule.grouped:
            raise ValueError(
                f"ops.select: gaps need an expert that is not selected, and no groups, got top_k={top_k}, "
                f"num_experts={experts}, n_group={rule.n_group}, topk_group={rule.topk_group}"
            )
        if not rule.gap_counts_BE.is_contiguous():
            raise ValueError(f"ops.select: gap_counts must be contiguous, got strides {rule.gap_counts_BE.stride()}")


def select(
    logits_TE: Tensor,
    top_k: int,
    implementation: str = "auto",
    *,
    score: str = "softmax",
    renormalize: bool = True,
    bias_E: Tensor | None = None,
    scores_TE: Tensor | None = None,
    scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    mask_T: Tensor | None = None,
    gap_counts_BE: Tensor | None = None,
) -> Selection:
    """Select the ``top_k`` experts of each token and their weights.

    Args:
        logits_TE: router logits, fp64, fp32, fp16 or bf16; any strides.
        top_k: experts per token, in [1, E].
        implementation: ``native`` (E <= 1024, K <= 32, n_group <= 32), ``torch`` (the reference) or ``auto``: native
            where it can be had, else the reference with one warning.
        score: ``softmax`` over the experts, ``sigmoid`` of each (DeepSeek-V3, arXiv:2412.19437, eq. 15), or
            ``sqrtsoftplus``, the root of log(1 + exp(logit)).
        renormalize: divide the K weights by their sum. With softmax this is the softmax over the K logits; without
            it the weights are the probabilities among all E experts.
        bias_E: fp32, added to the scores and not to the weights (loss-free balancing, arXiv:2408.15664). Finite. Gets
            no gradient.
        scores_TE: fp32, experts are selected by these in place of the logits, which still make the weights. Where a
            logit is not finite it is the score. Gets no gradient.
        scaling_factor: of the weights, after renormalisation.
        n_group: the experts are in so many groups of neighbours; all of a token's experts come from `topk_group` of
            them, those with the highest sum of the scores, biased, of their two best experts (arXiv:2412.19437,
            section 2.1.2).
        topk_group: groups of a token.
        mask_T: bool, True for tokens, False for padding, which gets ids and weights too, but is in neither the load
            nor the count of invalid rows. None: all are tokens.
        gap_counts_BE: fp32 (`GAP_BINS`, E); each valid token adds 1, in the bin of each expert's gap, which is how far
            its score, biased, is below that of the best expert that is not selected. See `gap_edges`.

    Raises:
        ValueError: wrong rank, dtype, shape, device, top_k, score, groups or implementation.
    """
    if logits_TE.dim() != 2:
        raise ValueError(
            f"ops.select: logits must have shape (tokens, experts), got {tuple(logits_TE.shape)}; "
            "flatten the batch first, x.reshape(-1, num_experts)"
        )
    rule = Rule(
        score, renormalize, scaling_factor, bias_E, scores_TE, n_group, topk_group, mask_T, gap_counts_BE
    )  # fmt: skip
    _validate(logits_TE, top_k, rule)
    limit = None
    experts = logits_TE.shape[1]
    if experts > native.MAX_EXPERTS or top_k > native.MAX_TOP_K or n_group > native.MAX_GROUPS:
        limit = (
            f"the kernels take num_experts <= {native.MAX_EXPERTS}, top_k <= {native.MAX_TOP_K} and n_group <= "
            f"{native.MAX_GROUPS}, got num_experts={experts}, top_k={top_k}, n_group={n_group}"
        )
    if not native.use_native("ops.select", implementation, native.kind(logits_TE), limit):
        return _reference(logits_TE, top_k, rule)
    if logits_TE.requires_grad and torch.is_grad_enabled():
        return Selection(*_Select.apply(logits_TE, top_k, *rule))
    return Selection(*_forward(logits_TE, top_k, *rule))
