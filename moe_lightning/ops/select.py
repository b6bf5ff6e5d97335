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


class Weighting(NamedTuple):
    """How logits become weights, and by what experts are selected in their place."""

    score: str = "softmax"
    renormalize: bool = True
    bias_E: Tensor | None = None
    scores_TE: Tensor | None = None


SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
_NATIVE_SCORES = SCORES[:2]
"""In the order of their codes in ``kernels/include/select.h``."""
#: Of how many experts of a group the scores are added to rank it.
GROUP_EXPERTS = 2
#: Below, softplus is the exponential function, in fp32.
_SOFTPLUS_IS_EXP = -17.0


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


def _scores(logits_TE: Tensor, how: Weighting) -> Tensor:
    """What experts are selected by, without gradient."""
    logits_TE = logits_TE.detach()
    if how.bias_E is None and how.scores_TE is None:
        return logits_TE
    scores_TE = how.scores_TE
    if scores_TE is None:
        scores_TE = expert_scores(logits_TE, how.score) + how.bias_E  # type: ignore[operator]
    return finite_or_logit(scores_TE, logits_TE)


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


def _reference(logits_TE: Tensor, top_k: int, how: Weighting) -> Selection:
    scores_TE = _scores(logits_TE, how)
    # + 0.0 turns -0 into +0: a radix sort tells them apart.
    sortable_TE = torch.where(scores_TE.isnan(), -torch.inf, scores_TE) + 0.0
    ids_TK = sortable_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k].int().contiguous()
    above_T = (scores_TE > -torch.inf).sum(1)  # NaN is not above
    bad_T = (scores_TE.isnan() | (scores_TE == torch.inf)).any(1) | (above_T < top_k)

    # Added, not filled in, so that the gradient of an invalid row is NaN as well.
    wide_TE = logits_TE.to(accum_dtype(logits_TE.dtype)) + torch.where(bad_T, torch.nan, 0.0)[:, None]
    weights_TK = _weights(wide_TE, ids_TK, how.score, how.renormalize)
    counts_E = _counts(ids_TK, logits_TE.shape[1], torch.ones_like(ids_TK))
    return Selection(weights_TK, ids_TK, counts_E, bad_T.sum(dtype=torch.int32))


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
    counts_E = _counts(ids_TK, selection.tokens_per_expert_E.numel(), real_T[:, None].expand_as(ids_TK))
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
    logits_TE: Tensor, top_k: int, score: str, renormalize: bool, bias_E: Tensor | None, scores_TE: Tensor | None
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
    native.module(native.kind(logits_TE)).select_forward(
        native.place(logits_TE), logits=logits_TE.data_ptr(), bias=native.pointer(bias_E),
        selection_scores=native.pointer(scores_TE), weights=weights_TK.data_ptr(), expert_ids=ids_TK.data_ptr(),
        tokens_per_expert=counts_E.data_ptr(), invalid_rows=invalid.data_ptr(), tokens=tokens, experts=experts,
        top_k=top_k, dtype=native.DTYPE_CODES[logits_TE.dtype], score=SCORES.index(score), renormalize=renormalize,
        row_stride=row_stride, threads=torch.get_num_threads(),
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
        renormalize=renormalize, row_stride=0 if logits_TE is None else logits_TE.stride(0),
    )  # fmt: skip
    return grad_logits_TE


# ---- fake and registration -------------------------------------------------------------------------------
_forward_op = register(
    "select_forward(Tensor logits_TE, int top_k, str score, bool renormalize, Tensor? bias_E, Tensor? scores_TE)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _call,
    _fake,
)
_backward_op = register(
    "select_backward(Tensor grad_TK, Tensor? logits_TE, Tensor weights_TK, Tensor ids_TK, int num_experts, "
    "ScalarType dtype, str score, bool renormalize) -> Tensor",
    _call_backward,
    _fake_backward,
)


def _forward(logits_TE: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_call if is_plain(logits_TE) else _forward_op)(logits_TE, *arguments)


# ---- autograd --------------------------------------------------------------------------------------------
class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int, *how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # or zeros would be made for ids, counts and invalid rows
        weights_TK, ids_TK, counts_E, invalid = _forward(logits_TE, top_k, *how)
        score, renormalize, *_ = how
        weights_are_enough = score == "softmax" and renormalize
        ctx.save_for_backward(None if weights_are_enough else logits_TE, weights_TK, ids_TK)
        ctx.rest = logits_TE.shape[1], logits_TE.dtype, score, renormalize
        ctx.mark_non_differentiable(ids_TK, counts_E, invalid)
        return weights_TK, ids_TK, counts_E, invalid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_TK is None:
            return (None,) * 6
        backward = _call_backward if is_plain(grad_TK) else _backward_op
        grad_logits_TE = backward(grad_TK, *ctx.saved_tensors, *ctx.rest)
        return grad_logits_TE, None, None, None, None, None


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


def _validate(logits_TE: Tensor, experts: int, top_k: int, how: Weighting) -> None:
    if logits_TE.dtype not in native.DTYPE_CODES:
        raise ValueError(f"ops.select: logits must be fp64, fp32, fp16 or bf16, got {logits_TE.dtype}; use .float()")
    if not 1 <= top_k <= experts:
        raise ValueError(f"ops.select: top_k must be in [1, num_experts], got top_k={top_k}, num_experts={experts}")
    if how.score not in SCORES:
        check_choice("ops.select", "score", how.score, SCORES)
    if how.bias_E is not None and how.scores_TE is not None:
        raise ValueError("ops.select: bias and scores must not both be given; add the bias to the scores")
    if how.bias_E is None and how.scores_TE is None:
        return
    for name, tensor, shape in (("bias", how.bias_E, logits_TE.shape[1:]), ("scores", how.scores_TE, logits_TE.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"ops.select: {name} must be fp32 of shape {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        check_same_device("ops.select", logits=logits_TE, **{name: tensor})


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
) -> Selection:
    """Select the ``top_k`` experts of each token and their weights.

    Args:
        logits_TE: router logits, fp64, fp32, fp16 or bf16; any strides.
        top_k: experts per token, in [1, E].
        implementation: ``native`` (E <= 1024, K <= 32), ``torch`` (the reference) or ``auto``: native where
            it can be had, else the reference with one warning.
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

    Raises:
        ValueError: wrong rank, dtype, shape, device, top_k, score, groups or implementation.
    """
    if logits_TE.dim() != 2:
        raise ValueError(
            f"ops.select: logits must have shape (tokens, experts), got {tuple(logits_TE.shape)}; "
            "flatten the batch first, x.reshape(-1, num_experts)"
        )
    how = Weighting(score, renormalize, bias_E, scores_TE)
    experts = logits_TE.shape[1]
    _validate(logits_TE, experts, top_k, how)
    if n_group != 1 or topk_group != 1:
        check_groups("ops.select", experts, top_k, n_group, topk_group)
    if mask_T is not None and (mask_T.dtype, mask_T.shape) != (torch.bool, logits_TE.shape[:1]):
        raise ValueError(
            f"ops.select: mask must be bool of shape {tuple(logits_TE.shape[:1])}, got {mask_T.dtype} "
            f"{tuple(mask_T.shape)}"
        )
    selection = _select(logits_TE, top_k, implementation, _ranked(logits_TE, how, n_group, topk_group))
    if scaling_factor != 1.0:
        selection = selection._replace(weights_TK=selection.weights_TK * scaling_factor)
    return selection if mask_T is None else of_real_tokens(selection, mask_T)


def _ranked(logits_TE: Tensor, how: Weighting, n_group: int, topk_group: int) -> Weighting:
    """With the scores by which the kernels select: they know no groups, and a bias of sigmoids alone."""
    grouped = topk_group < n_group
    if not grouped and (how.bias_E is None or how.score == "sigmoid"):
        return how
    logits_TE = logits_TE.detach()
    if how.scores_TE is not None:
        scores_TE = finite_or_logit(how.scores_TE, logits_TE)
    else:
        scores_TE = expert_scores(logits_TE, how.score)
        scores_TE = finite_or_logit(scores_TE if how.bias_E is None else scores_TE + how.bias_E, logits_TE)
    if grouped:
        scores_TE = _best_groups(scores_TE, n_group, topk_group)
    return how._replace(bias_E=None, scores_TE=scores_TE.float())


def _select(logits_TE: Tensor, top_k: int, implementation: str, how: Weighting) -> Selection:
    experts = logits_TE.shape[1]
    limit = None
    if how.score not in _NATIVE_SCORES:
        limit = f"the kernels take {' or '.join(_NATIVE_SCORES)}, got score={how.score}"
    if experts > native.MAX_EXPERTS or top_k > native.MAX_TOP_K:
        limit = (
            f"the kernels take num_experts <= {native.MAX_EXPERTS} and top_k <= {native.MAX_TOP_K}, "
            f"got num_experts={experts}, top_k={top_k}"
        )
    if not native.use_native("ops.select", implementation, native.kind(logits_TE), limit):
        return _reference(logits_TE, top_k, how)
    if logits_TE.requires_grad and torch.is_grad_enabled():
        return Selection(*_Select.apply(logits_TE, top_k, *how))
    return Selection(*_forward(logits_TE, top_k, *how))
