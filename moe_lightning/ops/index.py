"""The routing index: slots sorted by expert, where each expert's rows begin, and the way back.

Shapes: T tokens, E experts, K = top_k, N = T * K slots. Slot ``t * K + k`` is token t's k-th choice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.ops import native
from moe_lightning.ops.library import is_plain, register


class RoutingIndex(NamedTuple):
    """A stable sort of the slots by expert id. Dropped slots are last, in slot order."""

    expert_offsets: Tensor
    """int32 (E + 1), exclusive, starts at 0: expert e owns rows [offsets[e], offsets[e + 1])."""
    perm_N: Tensor
    """int32, sorted row -> slot."""
    inverse_perm_N: Tensor
    """int32, slot -> sorted row."""


# ---- torch reference -------------------------------------------------------------------------------------
def _reference(expert_ids_TK: Tensor, num_experts: int) -> RoutingIndex:
    ids_N = expert_ids_TK.reshape(-1).long()
    bins_N = torch.where((ids_N >= 0) & (ids_N < num_experts), ids_N, num_experts)
    perm_N = bins_N.argsort(stable=True)
    rows_N = torch.arange(ids_N.shape[0], dtype=torch.int32, device=ids_N.device)
    inverse_N = torch.empty_like(rows_N).scatter(0, perm_N, rows_N)
    # offsets[e] counts the slots of lower experts: one bin up, then a running sum.
    offsets = torch.zeros(num_experts + 2, dtype=torch.int32, device=ids_N.device)
    offsets = offsets.scatter_add(0, bins_N + 1, torch.ones_like(rows_N))[: num_experts + 1]
    return RoutingIndex(offsets.cumsum(0, dtype=torch.int32), perm_N.int(), inverse_N)


# ---- native call -----------------------------------------------------------------------------------------
def _empty_outputs(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = expert_ids_TK.numel()
    return (
        expert_ids_TK.new_empty((num_experts + 1,), dtype=torch.int32),
        expert_ids_TK.new_empty((slots,), dtype=torch.int32),
        expert_ids_TK.new_empty((slots,), dtype=torch.int32),
    )


def _call(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = expert_ids_TK.numel()
    allocate = native.allocator(expert_ids_TK)
    offsets = allocate((num_experts + 1,), (1,), torch.int32)
    perm_N, inverse_N = allocate((slots,), (1,), torch.int32), allocate((slots,), (1,), torch.int32)
    expert_ids_TK = expert_ids_TK.contiguous()
    kernels = native.module(native.kind(expert_ids_TK))
    workspace = allocate((kernels.index_workspace(slots, num_experts),), (1,), torch.int32)
    kernels.build_index(
        native.place(expert_ids_TK), expert_ids=expert_ids_TK.data_ptr(), expert_offsets=offsets.data_ptr(),
        perm=perm_N.data_ptr(), inverse_perm=inverse_N.data_ptr(), workspace=workspace.data_ptr(), slots=slots,
        experts=num_experts,
    )  # fmt: skip
    return offsets, perm_N, inverse_N


# ---- fake and registration -------------------------------------------------------------------------------
_index_op = register(
    "build_index(Tensor expert_ids_TK, int num_experts) -> (Tensor, Tensor, Tensor)", _call, _empty_outputs
)


# ---- public ----------------------------------------------------------------------------------------------
def build_index(expert_ids_TK: Tensor, num_experts: int, implementation: str = "auto") -> RoutingIndex:
    """Sort the slots by expert, stably, without waiting for the device.

    Args:
        expert_ids_TK: int32; ids outside [0, num_experts), such as -1, are dropped slots.
        num_experts: E, at least 1.
        implementation: ``native`` (E <= 1024), ``torch`` or ``auto``, as in :func:`moe_lightning.ops.select`.

    Raises:
        ValueError: wrong dtype, num_experts or implementation.
    """
    if expert_ids_TK.dtype != torch.int32:
        raise ValueError(f"ops.build_index: expert_ids must be int32, got {expert_ids_TK.dtype}; use .int()")
    if num_experts < 1:
        raise ValueError(f"ops.build_index: num_experts must be at least 1, got {num_experts}")
    limit = None
    if num_experts > native.MAX_EXPERTS:
        limit = f"the kernels take num_experts <= {native.MAX_EXPERTS}, got num_experts={num_experts}"
    if not native.use_native("ops.build_index", implementation, native.kind(expert_ids_TK), limit):
        return _reference(expert_ids_TK, num_experts)
    index = _call if is_plain(expert_ids_TK) else _index_op
    return RoutingIndex(*index(expert_ids_TK, num_experts))
