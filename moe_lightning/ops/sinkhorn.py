"""Sinkhorn balancing of router scores.

Shapes: T tokens, E experts.

Scales exp(logits / temperature) by rows and columns until each token gives 1 and each expert receives T / E
(Sinkhorn and Knopp, 1967; as entropic optimal transport, Cuturi, 2013; for routing, S-BASE in Clark et al.,
"Unified scaling laws for routed language models", 2022). Only the column potentials are kept, in the log
domain: a row step is a max-subtracted softmax, so a whole iteration takes one exp of the matrix, and nothing
overflows. The number of iterations is fixed: it always ends, on every rank alike, and never asks the device.
"""

import torch
from torch import Tensor

from moe_lightning.checks import check_sizes

_FP32 = torch.finfo(torch.float32)


def check_sinkhorn_arguments(component: str, iterations: int, temperature: float) -> None:
    """Raise ValueError unless iterations are positive and the temperature is a positive normal fp32 number."""
    check_sizes(component, iterations=iterations)
    if not _FP32.tiny <= temperature <= _FP32.max:
        raise ValueError(f"{component}: temperature must be positive and finite in fp32, got temperature={temperature}")


@torch.no_grad()
def sinkhorn(logits_TE: Tensor, iterations: int = 10, temperature: float = 1.0) -> Tensor:
    """Balanced log-scores (T, E), fp32, without gradient.

    The last half step is a row step: each row of ``exp(scores)`` sums to 1 exactly (within rounding), each
    column to T / E as near as the iterations brought it. A constant added to a row changes nothing.

    -inf entries are masks and stay -inf. Rows with a NaN or a +inf come back as NaN, rows of -inf alone as
    -inf; neither kind takes part in the column sums, so the other rows do not see them.

    Raises:
        ValueError: wrong rank, iterations < 1, or a temperature that is not positive and finite.
    """
    if logits_TE.dim() != 2:
        raise ValueError(f"ops.sinkhorn: logits must have shape (tokens, experts), got {tuple(logits_TE.shape)}")
    check_sinkhorn_arguments("ops.sinkhorn", iterations, temperature)

    scores_TE = logits_TE.float()
    broken_T1 = (scores_TE.isnan() | (scores_TE == torch.inf)).any(1, keepdim=True)
    empty_T1 = (scores_TE == -torch.inf).all(1, keepdim=True)
    excluded_T1 = broken_T1 | empty_T1
    scores_TE = scores_TE.masked_fill(excluded_T1, 0)
    # Subtract first: temperature may be small enough for a plain division to overflow.
    masked_TE = scores_TE == -torch.inf
    scores_TE = ((scores_TE - scores_TE.amax(1, keepdim=True)) / temperature).clamp_min(_FP32.min)
    scores_TE = scores_TE.masked_fill(masked_TE, -torch.inf)  # a mask stays one, a huge difference does not become one

    tiny = _FP32.tiny
    target = (~excluded_T1).sum() / logits_TE.shape[1]
    log_target = target.clamp_min(tiny).log()
    potential_E = scores_TE.new_zeros(logits_TE.shape[1])
    for _ in range(iterations):
        plan_TE = torch.softmax(scores_TE + potential_E, dim=1).masked_fill(excluded_T1, 0)
        # A column that underflows, or is masked whole, moves by at most log(tiny) a step and stays finite.
        potential_E = potential_E + log_target - plan_TE.sum(0).clamp_min(tiny).log()
    balanced_TE = torch.log_softmax(scores_TE + potential_E, dim=1)
    balanced_TE = balanced_TE.clamp_min(_FP32.min).masked_fill(masked_TE, -torch.inf)
    return balanced_TE.masked_fill(broken_T1, torch.nan).masked_fill(empty_T1, -torch.inf)
