"""What ours is measured against: routing as one writes it in torch, and other people's MoE layers where installed.

Legend: T tokens, D d_model, E experts, K top_k, N = T * K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.layers import MoE
from moe_lightning.ops import select


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select on logits, softmax over the winners: what ``select`` computes, less ties, NaN and counts."""
    top_TK, ids_TK = torch.topk(logits_TE, top_k, dim=1)
    return torch.softmax(top_TK, dim=1, dtype=torch.float32), ids_TK


def softmax_topk_renorm(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, select, normalise again: the same weights, the longer way."""
    top_TK, ids_TK = torch.topk(torch.softmax(logits_TE, dim=1, dtype=torch.float32), top_k, dim=1)
    return top_TK / top_TK.sum(1, keepdim=True), ids_TK


def biased_topk(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's selection: by sigmoid and bias, from the groups whose two best add up to most."""
    scores_TE = logits_TE.float().sigmoid()
    biased_TE = scores_TE + bias_E
    if n_group > 1:
        groups_TGE = biased_TE.unflatten(1, (n_group, -1))
        best_TG = groups_TGE.topk(2, dim=2).values.sum(2).topk(topk_group, dim=1).indices
        lost_TG = torch.ones_like(groups_TGE[..., 0], dtype=torch.bool).scatter_(1, best_TG, False)
        biased_TE = groups_TGE.masked_fill(lost_TG[..., None], -torch.inf).flatten(1)
    ids_TK = biased_TE.topk(top_k, dim=1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    return weights_TK / weights_TK.sum(1, keepdim=True), ids_TK


def sort_bincount_cumsum(ids_N: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The routing index as it is usually written; on CUDA ``bincount`` waits for the device."""
    perm_N = ids_N.argsort(stable=True)
    inverse_N = torch.empty_like(perm_N)
    inverse_N[perm_N] = torch.arange(perm_N.shape[0], device=perm_N.device)
    return torch.bincount(ids_N, minlength=experts).cumsum(0), perm_N, inverse_N


def sort_bincount_cumsum_only(ids_N: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The same without the inverse permutation, which a weighted sum back would still need."""
    return torch.bincount(ids_N, minlength=experts).cumsum(0), ids_N.argsort(stable=True)


def sort_scatter(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The whole routing index without waiting for the device."""
    ids_N = ids_TK.flatten()
    perm_N = ids_N.argsort(stable=True)
    rows_N = torch.arange(ids_N.shape[0], device=ids_N.device)
    inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, rows_N)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=ids_N.device)
    return counts_E.scatter_add_(0, ids_N, torch.ones_like(ids_N)).cumsum(0), perm_N, inverse_N


def gather_rows(x_TD: Tensor, perm_N: Tensor, top_k: int) -> Tensor:
    """Each slot's token row, in expert order."""
    return x_TD[perm_N // top_k]


def weighted_sum(rows_ND: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    """Rows back in token order, weighted and added up."""
    rows_TKD = rows_ND[inverse_N].view(*weights_TK.shape, -1)
    return (rows_TKD * weights_TK.to(rows_ND.dtype)[..., None]).sum(1)


def sinkhorn_loop(logits_TE: Tensor, iterations: int) -> Tensor:
    """Fixed iterations on the plain exponentials, as in Megatron-LM, its test of convergence left out."""
    cost_TE = torch.exp(logits_TE.float())
    tokens, experts = cost_TE.shape
    rows_T, columns_E = cost_TE.new_ones(tokens), cost_TE.new_ones(experts)
    for _ in range(iterations):
        rows_T = 1 / (tokens * ((columns_E * cost_TE).sum(1) + 1e-8))
        columns_E = 1 / (experts * ((rows_T[:, None] * cost_TE).sum(0) + 1e-8))
    return columns_E * cost_TE * rows_T[:, None]


#: A layer as a function of its tokens (T, D), and what gets a gradient.
Layer = tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]


def mixtral(moe: MoE, d_model: int, hidden_dim: int) -> Layer:
    """transformers' `MixtralSparseMoeBlock` with its `grouped_mm` experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=hidden_dim,
        num_local_experts=moe.router.num_experts,
        num_experts_per_tok=moe.router.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(moe.router.weight.detach())
    block.experts.gate_up_proj, block.experts.down_proj = moe.experts.up, moe.experts.down
    leaves = block.gate.weight, moe.experts.up, moe.experts.down
    return lambda x_TD: block(x_TD[None])[0], leaves


def liger(moe: MoE, d_model: int, hidden_dim: int) -> Layer:
    """Liger's fused MoE (Triton), which begins after the selection: gate and selection are ours."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weight_ED = moe.router.weight

    def call(x_TD: Tensor) -> Tensor:
        selection: Any = select(nn.functional.linear(x_TD, weight_ED), moe.router.top_k)
        weights_TK = selection.weights_TK.to(x_TD.dtype)
        return LigerFusedMoEFunction.apply(x_TD, moe.experts.up, moe.experts.down, selection.expert_ids_TK, weights_TK)

    return call, (weight_ED, moe.experts.up, moe.experts.down)


#: Rows, columns and kind of the tiles that SonicMoE may choose from: all of its own take some ten minutes to compile.
_SONIC_TILES = {(128, 128, "pingpong"), (128, 192, "pingpong"), (256, 128, "cooperative"), (256, 192, "cooperative")}
_SONIC_PACKAGES = (
    "sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 nvidia-cutlass-dsl-libs-base==4.4.2 "
    "apache-tvm-ffi==0.1.9 torch-c-dlpack-ext==0.1.5 cuda-python"
)


def sonic(moe: MoE, d_model: int, hidden_dim: int) -> Layer:
    """SonicMoE (arXiv:2512.14080), in CuTe DSL for sm_90 and newer; gate and selection are its own."""
    try:
        from quack import gemm_interface
        from sonicmoe import moe_TC_softmax_topk_layer
        from sonicmoe.enums import ActivationType
    except ImportError as error:
        raise ImportError(f"{error}; Python 3.12, pip install --no-deps {_SONIC_PACKAGES}") from error
    for tuner in vars(gemm_interface).values():
        if isinstance(getattr(tuner, "configs", None), list):
            tuner.configs = [config for config in tuner.configs if _is_of_sonic_tiles(config.kwargs["config"])]
    weight_ED, up, down = moe.router.weight, moe.experts.up, moe.experts.down

    def call(x_TD: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(x_TD.device).cuda_stream if x_TD.is_cuda else 0
        # Softmax over the chosen logits, and gate rows before up rows, as ours.
        y_TD, *_ = moe_TC_softmax_topk_layer(
            x_TD,
            weight_ED,
            up.permute(1, 2, 0),
            None,
            down.permute(1, 2, 0),
            None,
            moe.router.top_k,
            stream,
            ActivationType.SWIGLU,
            is_inference_mode_enabled=False,
            is_softmax_over_topk=True,
            norm_topk_probs=False,
            concat_layout=True,
        )
        return y_TD

    return call, (weight_ED, up, down)


def _is_of_sonic_tiles(config: Any) -> bool:
    kind = "pingpong" if config.pingpong else "cooperative"
    tile = config.tile_m, config.tile_n, kind
    return tile in _SONIC_TILES and (config.cluster_m, config.cluster_n) == (2, 1) and not config.swap_ab


#: By the name on the command line: the name in the table, and how it is made.
LAYERS: dict[str, tuple[str, Callable[[MoE, int, int], Layer]]] = {
    "transformers": ("transformers: Mixtral, grouped_mm", mixtral),
    "liger": ("Liger: fused MoE", liger),
    "sonic": ("SonicMoE", sonic),
}
