"""Tensor operations of MoE routing: native where the kernels are built, each with a torch reference."""

from moe_lightning.ops.expert_ffn import RowWeights, expert_ffn
from moe_lightning.ops.index import RoutingIndex, build_index
from moe_lightning.ops.permute import Gathered, permute, sum_rows, unpermute
from moe_lightning.ops.select import Selection, select
from moe_lightning.ops.sinkhorn import check_sinkhorn_arguments, sinkhorn

__all__ = [
    "Gathered",
    "RoutingIndex",
    "RowWeights",
    "Selection",
    "build_index",
    "check_sinkhorn_arguments",
    "expert_ffn",
    "permute",
    "select",
    "sinkhorn",
    "sum_rows",
    "unpermute",
]
