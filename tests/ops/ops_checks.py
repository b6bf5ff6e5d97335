"""What every implementation must answer, worked out in numpy fp64, and the checks that compare with it.

Shapes: T tokens, E experts, K = top_k, N = T * K slots.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lightning.ops import RoutingIndex, Selection, build_index, native, select
from moe_lightning.ops.select import GAP_BINS, gap_edges

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.missing("cuda") is not None, reason=f"{native.missing('cuda')}"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
SCORES = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.log1p(logits.exp()).sqrt(),
}
WEIGHTINGS = [(score, renormalize) for score in SCORES for renormalize in (True, False)]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
# Weights are worked out in fp32 (fp64 for fp64); gradients are then rounded to the dtype of the logits.
WEIGHT_ATOL = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-6,
    torch.bfloat16: 1e-6,
}
GRAD_ATOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def reference_ids(logits_TE: Tensor, top_k: int) -> np.ndarray:
    """A stable sort, best first; NaN stands with -inf."""
    scores_TE = logits_TE.detach().cpu().double().numpy()
    scores_TE = np.where(np.isnan(scores_TE), -np.inf, scores_TE)
    return np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k]


def reference_invalid(logits_TE: Tensor, top_k: int) -> np.ndarray:
    scores_TE = logits_TE.detach().cpu().double().numpy()
    too_few_T = (scores_TE > -np.inf).sum(1) < top_k
    return np.isnan(scores_TE).any(1) | (scores_TE == np.inf).any(1) | too_few_T


def reference_weights(logits_TE: Tensor, ids_TK: np.ndarray) -> np.ndarray:
    """fp64 softmax over the selected logits; NaN in invalid rows."""
    selected_TK = np.take_along_axis(logits_TE.detach().cpu().double().numpy(), ids_TK, 1)
    with np.errstate(invalid="ignore"):
        exp_TK = np.exp(selected_TK - selected_TK.max(1, keepdims=True))
        weights_TK = exp_TK / exp_TK.sum(1, keepdims=True)
    weights_TK[reference_invalid(logits_TE, ids_TK.shape[1])] = np.nan
    return weights_TK


def check_select(logits_TE: Tensor, top_k: int, implementation: str) -> Selection:
    """Ids, counts and the invalid count exactly; weights within the table's tolerance."""
    selection = select(logits_TE, top_k, implementation)
    tokens, experts = logits_TE.shape
    ids_TK = reference_ids(logits_TE, top_k)

    wide = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    assert selection.weights_TK.dtype == wide
    assert selection.expert_ids_TK.dtype == torch.int32
    assert all(t.device == logits_TE.device for t in selection)
    np.testing.assert_array_equal(selection.expert_ids_TK.cpu().numpy(), ids_TK)
    np.testing.assert_array_equal(
        selection.tokens_per_expert_E.cpu().numpy(), np.bincount(ids_TK.ravel(), minlength=experts)
    )
    assert selection.tokens_per_expert_E.sum().item() == tokens * top_k
    assert selection.invalid_rows.shape == ()
    assert selection.invalid_rows.item() == reference_invalid(logits_TE, top_k).sum()
    np.testing.assert_allclose(
        selection.weights_TK.detach().cpu().double().numpy(),
        reference_weights(logits_TE, ids_TK),
        rtol=0,
        atol=WEIGHT_ATOL[logits_TE.dtype],
    )
    return selection


def check_select_grad(logits_TE: Tensor, top_k: int, implementation: str) -> None:
    """The gradient of a random weighting, against the formula in fp64."""
    logits_TE = logits_TE.detach().requires_grad_()
    weights_TK = check_select(logits_TE, top_k, implementation).weights_TK
    upstream_TK = torch.randn(weights_TK.shape, dtype=torch.float64)
    weights_TK.backward(upstream_TK.to(weights_TK))

    ids_TK = reference_ids(logits_TE, top_k)
    w_TK, g_TK = reference_weights(logits_TE, ids_TK), upstream_TK.numpy()
    expected_TE = np.zeros(logits_TE.shape)
    slot_grads_TK = w_TK * (g_TK - (w_TK * g_TK).sum(1, keepdims=True))
    np.put_along_axis(expected_TE, ids_TK, slot_grads_TK, 1)
    assert logits_TE.grad is not None
    np.testing.assert_allclose(
        logits_TE.grad.cpu().double().numpy(), expected_TE, rtol=0, atol=GRAD_ATOL[logits_TE.dtype]
    )


def check_grad_rounding(dtype: torch.dtype, device: str) -> None:
    """Gradients are rounded to half types as torch rounds: to nearest even, with subnormals, to inf.

    With two equal logits and upstream (2x, 0) the gradient is x / 2, without rounding before the last step.
    """
    x_T = torch.randint(-(2**31), 2**31, (200_000,)).int().view(torch.float32)
    edges_T = torch.arange(-(2**15), 2**15).short().view(dtype).float()  # every value, and the halfway points
    halfway_T = (edges_T + edges_T.roll(1)) / 2
    x_T = torch.cat([x_T, edges_T, halfway_T])
    x_T = 2 * x_T[x_T.abs() < 5e37]  # finite still when doubled twice
    logits_TE = torch.zeros(len(x_T), 2, dtype=dtype, device=device, requires_grad=True)
    upstream_TK = torch.stack([2 * x_T, torch.zeros_like(x_T)], 1).to(device)
    select(logits_TE, 2, "native").weights_TK.backward(upstream_TK)
    assert logits_TE.grad is not None
    assert torch.equal(logits_TE.grad[:, 0].cpu(), (x_T / 2).to(dtype))


def any_bits(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Logits whose bits are uniformly random: NaNs of every payload, infinities, subnormals."""
    size = torch.finfo(dtype).bits
    if size == 64:
        bits = torch.randint(-(2**63), 2**63 - 1, (tokens, experts))
    else:
        bits = torch.randint(-(2 ** (size - 1)), 2 ** (size - 1), (tokens, experts))
    logits_TE = bits.to(BITS[dtype]).view(dtype)
    logits_TE[0] = torch.nan
    logits_TE[1:3].view(BITS[dtype])[:] = torch.tensor([[-1], [0]])  # the negative NaN of all ones
    return logits_TE


def views(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Logits (33, 12) that no kernel may take for a plain array."""

    def base(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)

    return {
        "transposed": base(12, 33).t(),
        "row slice": base(66, 12)[::2],
        "column slice": base(33, 40)[:, 7:19],
        "column step": base(33, 24)[:, ::2],
        "expanded rows": base(1, 12).expand(33, 12),
        "expanded columns": base(33, 1).expand(33, 12),
        "misaligned": base(33 * 12 + 1)[1:].view(33, 12),
    }


def check_index(ids_TK: Tensor, num_experts: int, implementation: str) -> RoutingIndex:
    """Offsets, permutation and inverse, exactly; ids outside [0, E) at the tail in slot order."""
    index = build_index(ids_TK, num_experts, implementation)
    ids_N = ids_TK.cpu().numpy().ravel()
    bins_N = np.where((ids_N >= 0) & (ids_N < num_experts), ids_N, num_experts)
    perm_N = np.argsort(bins_N, kind="stable")
    counts = np.bincount(bins_N, minlength=num_experts + 1)[:num_experts]
    np.testing.assert_array_equal(index.perm_N.cpu().numpy(), perm_N)
    np.testing.assert_array_equal(index.inverse_perm_N.cpu().numpy(), np.argsort(perm_N))
    np.testing.assert_array_equal(index.expert_offsets.cpu().numpy(), np.concatenate([[0], np.cumsum(counts)]))
    assert all(t.dtype == torch.int32 and t.device == ids_TK.device for t in index)
    return index


def weighting_reference(logits_TE: Tensor, ids_TK: Tensor, score: str, renormalize: bool) -> Tensor:
    """Weights in fp64, differentiable: what each way of weighting says, as one would write it down."""
    scores_TE = SCORES[score](logits_TE.double())
    weights_TK = scores_TE.gather(1, ids_TK.long())
    return weights_TK / weights_TK.sum(1, keepdim=True) if renormalize else weights_TK


def check_weighting(logits_TE: Tensor, top_k: int, implementation: str, how: tuple[str, bool]) -> None:
    """Weights and the gradient of a random weighting of them, against autograd in fp64."""
    score, renormalize = how
    logits_TE = logits_TE.detach().requires_grad_()
    selection = select(logits_TE, top_k, implementation, score=score, renormalize=renormalize)
    np.testing.assert_array_equal(selection.expert_ids_TK.cpu().numpy(), reference_ids(logits_TE, top_k))

    leaf_TE = logits_TE.detach().double().requires_grad_()
    expected_TK = weighting_reference(leaf_TE, selection.expert_ids_TK, *how)
    atol = WEIGHT_ATOL[logits_TE.dtype]
    torch.testing.assert_close(selection.weights_TK.double(), expected_TK, rtol=0, atol=atol)
    upstream_TK = torch.randn_like(expected_TK)
    (expected_TE,) = torch.autograd.grad(expected_TK, leaf_TE, upstream_TK)
    (actual_TE,) = torch.autograd.grad(selection.weights_TK, logits_TE, upstream_TK.to(selection.weights_TK.dtype))
    torch.testing.assert_close(actual_TE.double(), expected_TE, rtol=0, atol=GRAD_ATOL[logits_TE.dtype])


def check_ranks(dtype: torch.dtype, device: str, implementation: str) -> None:
    """Ranks of their own choose; the logits still make the weights."""
    logits_TE = (torch.randint(-64, 64, (500, 24)) / 16).to(device, dtype)
    logits_TE[0, 3], logits_TE[1, 5], logits_TE[2, :22], logits_TE[3, 2:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    scores_TE = (torch.randint(-64, 64, (500, 24)) / 16).to(device)
    finite_TE = logits_TE.float().isfinite()
    expected_TE = torch.where(finite_TE, scores_TE, logits_TE.float())
    selection = select(logits_TE, 3, implementation, scores_TE=scores_TE)
    ids_TK = reference_ids(expected_TE, 3)
    np.testing.assert_array_equal(selection.expert_ids_TK.cpu().numpy(), ids_TK)
    np.testing.assert_allclose(
        selection.weights_TK.cpu().double().numpy(), reference_weights(logits_TE, ids_TK), rtol=0, atol=1e-6
    )
    assert selection.invalid_rows.item() == 4  # NaN, +inf, two experts left, and two again
    np.testing.assert_array_equal(selection.tokens_per_expert_E.cpu(), np.bincount(ids_TK.ravel(), minlength=24))


def check_bias(score: str, dtype: torch.dtype, device: str, implementation: str, experts: int = 48) -> None:
    """No expert left out outranks one that was chosen by more than rounding can explain."""
    logits_TE, bias_E = torch.randn(700, experts, device=device).to(dtype), torch.randn(experts, device=device) / 4
    chosen = select(logits_TE, 4, implementation, score=score, bias_E=bias_E, scaling_factor=0.5)
    scores_TE = SCORES[score](logits_TE.double()) + bias_E.double()
    chosen_TK = scores_TE.gather(1, chosen.expert_ids_TK.long())
    rest_TE = scores_TE.scatter(1, chosen.expert_ids_TK.long(), -torch.inf)
    assert (chosen_TK.diff(dim=1) <= 1e-6).all()
    assert (rest_TE.amax(1) <= chosen_TK[:, -1] + 1e-6).all()
    expected_TK = weighting_reference(logits_TE, chosen.expert_ids_TK, score, True) / 2
    torch.testing.assert_close(chosen.weights_TK.double(), expected_TK, rtol=0, atol=1e-6)
    counts_E = torch.bincount(chosen.expert_ids_TK.flatten(), minlength=experts)
    assert chosen.tokens_per_expert_E.tolist() == counts_E.tolist()
    assert chosen.invalid_rows.item() == 0


def check_weight_scaling(logits_TE: Tensor, implementation: str, how: tuple[str, bool]) -> None:
    """A scaling factor multiplies weights and their gradients, and nothing else."""
    logits_TE = logits_TE.detach().requires_grad_()
    score, renormalize = how
    plain, scaled = (
        select(logits_TE, 3, implementation, score=score, renormalize=renormalize, scaling_factor=factor)
        for factor in (1.0, 2.5)
    )
    assert scaled.expert_ids_TK.equal(plain.expert_ids_TK)
    torch.testing.assert_close(scaled.weights_TK, plain.weights_TK * 2.5, rtol=1e-6, atol=0)
    upstream_TK = torch.randn_like(plain.weights_TK)
    grads = (torch.autograd.grad(one.weights_TK, logits_TE, upstream_TK)[0].double() for one in (plain, scaled))
    plain_TE, scaled_TE = grads
    torch.testing.assert_close(scaled_TE, plain_TE * 2.5, rtol=0, atol=3 * GRAD_ATOL[logits_TE.dtype])


def check_gaps(logits_TE: Tensor, top_k: int, implementation: str, **options: Any) -> None:
    """Tokens by how far each expert's score is below the best one that was not selected, and only added to."""
    experts, device = logits_TE.shape[1], logits_TE.device
    gap_counts_BE = torch.full((GAP_BINS, experts), 3.0, device=device)
    selection = select(logits_TE, top_k, implementation, gap_counts_BE=gap_counts_BE, **options)
    scores_TE = SCORES[options["score"]](logits_TE.double()) + options["bias_E"].double()
    cutoff_T1 = scores_TE.sort(dim=1, descending=True).values[:, top_k : top_k + 1]
    mask_T = options.get("mask_T")
    counted_T = ~selection.weights_TK.isnan().any(1)
    counted_T = counted_T if mask_T is None else counted_T & mask_T
    gaps_TE = (cutoff_T1 - scores_TE)[counted_T]
    counts_BE = gap_counts_BE - 3.0
    assert counts_BE.sum(0).tolist() == [counted_T.sum().item()] * experts
    edges = gap_edges(device).double()
    assert (edges.diff() > 0).all()
    assert edges.numel() == GAP_BINS + 1
    # Each count lies between those of gaps that are in the bin for certain, and those that rounding may put there.
    for slack, holds in ((-2e-6, torch.ge), (2e-6, torch.le)):
        low, high = edges[:-1, None, None] - slack, edges[1:, None, None] + slack
        low[0], high[-1] = -torch.inf, torch.inf
        inside_BE = ((gaps_TE >= low) & (gaps_TE < high)).sum(1)
        assert holds(counts_BE, inside_BE).all()
