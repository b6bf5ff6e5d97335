"""Sinkhorn balancing of router scores.

Shapes: T tokens, E experts.

Scales exp(logits / temperature) by rows and columns until each token gives 1 and each expert receives T / E
(Sinkhorn and Knopp, 1967; as entropic optimal transport, Cuturi, 2013; for routing, S-BASE in Clark et al.,
"Unified scaling laws for routed language models", 2022). Only the column potentials are kept, in the log
domain: a row step is a max-subtracted softmax, so a whole iteration takes one exp of the matrix, and nothing
overflows. The number of iterations is fixed: it ends after as many on every rank and reads nothing from the device.
"""

import torch
from torch import Tensor

from moe_lightning.ops import native
from moe_lightning.ops.library import is_plain, register
from moe_lightning.utils.checks import check_fraction, check_sizes

_FP32 = torch.finfo(torch.float32)


def check_sinkhorn_arguments(component: str, iterations: int, temperature: float, tolerance: float) -> None:
    """Raise ValueError for iterations < 1, a temperature that is no positive normal fp32, a tolerance not in [0, 1)."""
    check_sizes(component, iterations=iterations)
    if not _FP32.tiny <= temperature <= _FP32.max:
        raise ValueError(f"{component}: temperature must be positive and finite in fp32, got temperature={temperature}")
    check_fraction(component, "tolerance", tolerance)


def _to_fp32(logits_TE: Tensor) -> Tensor:
    """As fp32, without making infinities of large fp64 numbers."""
    if logits_TE.dtype == torch.float64:
        logits_TE = torch.where(logits_TE.isinf(), logits_TE, logits_TE.clamp(_FP32.min, _FP32.max))
    return logits_TE.float()


# ---- torch reference, and the CPU's implementation -------------------------------------------------------
def _reference(logits_TE: Tensor, iterations: int, temperature: float, tolerance: float) -> Tensor:
    scores_TE = _to_fp32(logits_TE)
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
    balanced = torch.zeros((), dtype=torch.bool, device=logits_TE.device)
    for _ in range(iterations):
        plan_TE = torch.softmax(scores_TE + potential_E, dim=1).masked_fill(excluded_T1, 0)
        sums_E = plan_TE.sum(0)
        # A column that underflows, or is masked whole, moves by at most log(tiny) a step and stays finite.
        step_E = log_target - sums_E.clamp_min(tiny).log()
        potential_E = potential_E + (step_E.masked_fill(balanced, 0) if tolerance else step_E)
        if tolerance:
            balanced |= (((sums_E - target).abs() <= tolerance * target) | (sums_E == 0)).all()
    scores_TE = torch.log_softmax(scores_TE + potential_E, dim=1)
    scores_TE = scores_TE.clamp_min(_FP32.min).masked_fill(masked_TE, -torch.inf)
    return scores_TE.masked_fill(broken_T1, torch.nan).masked_fill(empty_T1, -torch.inf)


# ---- native call -----------------------------------------------------------------------------------------
def _call_cuda(logits_TE: Tensor, iterations: int, temperature: float, tolerance: float) -> Tensor:
    tokens, experts = logits_TE.shape
    limit = None
    if experts > native.MAX_EXPERTS:
        limit = f"the kernels take num_experts <= {native.MAX_EXPERTS}, got num_experts={experts}"
    if not native.use_native("ops.sinkhorn", "auto", "cuda", limit):
        return _reference(logits_TE, iterations, temperature, tolerance)
    if logits_TE.dtype == torch.float64:
        logits_TE = _to_fp32(logits_TE)
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    kernels = native.module("cuda")
    allocate = native.allocator(logits_TE)
    scores_TE = allocate((tokens, experts), (experts, 1), torch.float32)
    workspace = allocate((kernels.sinkhorn_workspace(experts),), (1,), torch.float32)
    kernels.sinkhorn(
        native.place(logits_TE), logits=logits_TE.data_ptr(), scores=scores_TE.data_ptr(),
        workspace=workspace.data_ptr(), tokens=tokens, experts=experts, dtype=native.DTYPE_CODES[logits_TE.dtype],
        iterations=iterations, temperature=temperature, tolerance=tolerance, row_stride=logits_TE.stride(0),
    )  # fmt: skip
    return scores_TE


# ---- fake and registration -------------------------------------------------------------------------------
_sinkhorn_op = register(
    "sinkhorn(Tensor logits_TE, int iterations, float temperature, float tolerance) -> Tensor",
    _reference,
    lambda logits_TE, *_: logits_TE.new_empty(logits_TE.shape, dtype=torch.float32),
    _call_cuda,
)


# ---- public ----------------------------------------------------------------------------------------------
def sinkhorn(logits_TE: Tensor, iterations: int = 10, temperature: float = 1.0, tolerance: float = 0.0) -> Tensor:
    """Balanced log-scores (T, E), fp32, without gradient.

    The last half step is a row step: each row of ``exp(scores)`` sums to 1 exactly (within rounding), each
    column to T / E as near as the iterations brought it. A constant added to a row changes nothing.

    -inf entries are masks and stay -inf. Rows with a NaN or a +inf come back as NaN, rows of -inf alone as
    -inf; neither kind takes part in the column sums, so the other rows do not see them.

    Args:
        logits_TE: fp64, fp32, fp16 or bf16; any strides. Arithmetic is fp32.
        iterations: column steps, at most.
        temperature: divides the logits.
        tolerance: stop after the step in which every column was within this fraction of its target, as decided on the
            device; 0: take all iterations. A column with no mass at all is left out of the question.

    Raises:
        ValueError: wrong rank or dtype, iterations < 1, a temperature that is not positive and finite, a tolerance
            not in [0, 1).
    """
    if logits_TE.dim() != 2:
        raise ValueError(f"ops.sinkhorn: logits must have shape (tokens, experts), got {tuple(logits_TE.shape)}")
    if logits_TE.dtype not in native.DTYPE_CODES:
        raise ValueError(f"ops.sinkhorn: logits must be fp64, fp32, fp16 or bf16, got {logits_TE.dtype}; use .float()")
    check_sinkhorn_arguments("ops.sinkhorn", iterations, temperature, tolerance)
    call = _call_cuda if logits_TE.is_cuda and is_plain(logits_TE) else _sinkhorn_op
    return call(logits_TE.detach(), iterations, temperature, tolerance)
