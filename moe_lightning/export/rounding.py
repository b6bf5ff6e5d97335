"""What rounding may change: outputs by a little, and experts where two rank almost the same.

The model itself is off by its rounding, so model and file are both held against the same weights in the next wider
type: the file may be off by twice what the model is, and one rounding step. In fp32 it may always be off by 1e-5.

Legend: B batch, S sequence, L MoE layers, T = B * S tokens, K top_k, E experts.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lightning.models import LMOutput
from moe_lightning.routers import Routing

#: Dtypes of weights that can be compared, and what tells their rounding.
WIDER = {torch.float32: torch.float64, torch.float16: torch.float32}
DTYPES = tuple(WIDER)
#: Two fp32 numbers near 1 whose sums were taken in another order.
_FP32_TOLERANCE = 1e-5


class NearTieError(Exception):
    """Rounding decides about so many experts that the input says little about the file."""


class Computed(NamedTuple):
    """A model's outputs, and what its MoE layers decided."""

    outputs: Tensor
    routings: tuple[Routing, ...]


def compute(model: nn.Module, inputs: Tensor) -> tuple[Computed, Computed]:
    """By the model, and by the same weights in the next wider type."""

    def run(model: nn.Module, inputs: Tensor) -> Computed:
        with torch.no_grad():
            output = model(inputs)
        return Computed(output.logits_BSV, output.routings) if isinstance(output, LMOutput) else Computed(output, ())

    ours = run(model, inputs)
    wider = WIDER[ours.outputs.dtype]
    return ours, run(copy.deepcopy(model).to(wider), inputs.to(wider) if inputs.is_floating_point() else inputs)


def tolerance(dtype: torch.dtype, ours: Tensor, exact: Tensor) -> float:
    """How far from `exact` a file with weights of `dtype` may be where the model is at `ours`."""
    rounding = 2 * largest(ours - exact) + torch.finfo(dtype).eps * largest(exact)
    return max(rounding, _FP32_TOLERANCE) if dtype == torch.float32 else rounding


def largest(values: Tensor) -> float:
    """Magnitude; NaN if one is."""
    return float(values.float().abs().max())


def same_experts(ours: Computed, exact: Computed, ids_LTK: Tensor) -> Tensor:
    """Positions (B, S) up to which file, model and wider type chose the same experts of all layers in their row.

    What lies behind another choice only sees what came of it. A file may choose otherwise where two logits are nearer
    than rounding tells apart, and not at a true tie: there the lower id goes first.

    Raises:
        ValueError: the file chose otherwise where it may not.
        NearTieError: these positions are less than a quarter.
    """
    same_BS = torch.ones(exact.outputs.shape[:2], dtype=torch.bool)
    for layer, (our, true, ids_TK) in enumerate(zip(ours.routings, exact.routings, ids_LTK, strict=True)):
        same_T = same_BS.flatten()
        true_TK = true.selection.expert_ids_TK
        other_TK = (ids_TK != true_TK) & same_T[:, None]
        if bool(other_TK.any()):
            of_true, of_file = (
                true.logits_TE.gather(1, ids.clamp(0, true.logits_TE.shape[1] - 1).long())[other_TK]
                for ids in (true_TK, ids_TK)
            )
            gaps = (of_true - of_file).abs()
            illegal = bool(((ids_TK < 0) | (ids_TK >= true.logits_TE.shape[1])).any())
            allowed = tolerance(ours.outputs.dtype, our.logits_TE[same_T], true.logits_TE[same_T])
            if illegal or not 0 < float(gaps.min()) <= float(gaps.max()) <= allowed:
                raise ValueError(
                    f"export: expert ids must be equal, got {int(other_TK.any(1).sum())} tokens with other experts in "
                    f"layer {layer}; the file is not used"
                )
        other_T = other_TK.any(1) | (our.selection.expert_ids_TK != true_TK).any(1)
        same_BS = same_BS & (other_T.view_as(same_BS).cumsum(1) == 0)
    if same_BS.float().mean() < 0.25:
        raise NearTieError
    return same_BS
