"""The K largest logits: `naive_topk` in torch, `fused_select` by our kernels, `masked_matmul` without moving rows."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection, select
from moe_lightning.routers.base import Router

#: A warning is given where the experts take more than this many times the FLOPs.
_FLOP_RATIO_WARNING = 8


class TopK(Router):
    """Stable sort, then softmax over the K selected logits, as in Mixtral (arXiv:2401.04088, section 2.1)."""

    #: Of `ops.select`: "torch", or "auto": native, and where the module for a device is missing torch, with a warning.
    implementation: ClassVar[Literal["auto", "torch"]]

    @override
    def select_experts(self, logits_TE: Tensor) -> Selection:
        return select(logits_TE, self.top_k, self.implementation)


class NaiveTopK(TopK):
    """`naive_topk`: the router as one writes it in plain torch, and the reference for all others."""

    implementation = "torch"


class FusedSelect(TopK):
    """`fused_select`: top-k, softmax and the load count in one native pass over the logits.

    The ids of `naive_topk` exactly and its weights within fp32 rounding.
    """

    implementation = "auto"


class MaskedMatmul(TopK):
    """`masked_matmul`: no permutation; every expert computes every token and a mask of weights keeps the K chosen.

    T_pack is making the (T, E) mask alone. The experts cost E / K times the FLOPs of a permuting router and E * T * F
    activations: it pays for small E, where sorting and gathering cost more than the wasted products.
    """

    implementation = "torch"
    dispatch_mode: ClassVar[Literal["permute", "masked"]] = "masked"

    def __init__(self, d_model: int, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        if num_experts > _FLOP_RATIO_WARNING * top_k:
            warnings.warn(
                f"router.masked_matmul: the experts cost num_experts / top_k = {num_experts / top_k:.0f} times the "
                f"FLOPs, got num_experts={num_experts}, top_k={top_k}; a router that permutes is cheaper",
                stacklevel=2,
            )
