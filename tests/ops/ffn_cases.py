"""Rows sorted by expert, experts and combine weights, and the plain autograd that `expert_ffn` must agree with."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lightning.ops import RowWeights, build_index, expert_ffn


class Case(NamedTuple):
    """Leaves, and what goes with them."""

    rows_ND: Tensor
    up_EGD: Tensor
    down_EDF: Tensor
    weights_TK: Tensor
    offsets: Tensor
    perm_N: Tensor
    ids_N: Tensor
    """Expert of each row; E for the rows behind the last offset."""


def make_case(counts, d_model, hidden_dim, activation, dtype, device="cpu", dropped=0, top_k=2):
    """Random ids with these counts a expert; `dropped` slots more belong to none."""
    experts = len(counts)
    ids = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)] + [-1] * dropped, dtype=torch.int32)
    assert len(ids) % top_k == 0
    ids_TK = ids[torch.randperm(len(ids))].view(-1, top_k).to(device)
    index = build_index(ids_TK, experts)
    width = 2 * hidden_dim if activation == "swiglu" else hidden_dim
    sizes = (len(ids), d_model), (experts, width, d_model), (experts, d_model, hidden_dim)
    tensors = [torch.randn(*size).to(device, dtype) for size in sizes]
    tensors[1], tensors[2] = tensors[1] * d_model**-0.5, tensors[2] * hidden_dim**-0.5
    weights_TK = torch.rand(len(ids) // top_k, top_k).to(device, torch.float64 if dtype == torch.float64 else None)
    ids_N = ids_TK.flatten()[index.perm_N.long()]
    return Case(*tensors, weights_TK, index.expert_offsets, index.perm_N, torch.where(ids_N < 0, experts, ids_N))


def run(case, activation, weighted, upstream_ND, buffer_ND=None, sm_margin=0):
    """Outputs and the gradients of every leaf, of the rows that belong to an expert."""
    leaves = [t.detach().clone().requires_grad_() for t in case[:4]]
    row_weights = RowWeights(leaves[3], case.perm_N) if weighted else None
    out_ND = expert_ffn(*leaves[:3], case.offsets, activation, row_weights, buffer_ND, sm_margin=sm_margin)
    live = int(case.offsets[-1])
    wanted, kept_ND = leaves if weighted else leaves[:3], out_ND[:live].detach()
    if buffer_ND is not None:
        assert out_ND.data_ptr() == buffer_ND.data_ptr()
        kept_ND = kept_ND.clone()  # backward writes to the same place
    grads = torch.autograd.grad(out_ND, wanted, upstream_ND, retain_graph=False)
    assert buffer_ND is None or grads[0].data_ptr() == buffer_ND.data_ptr()
    return [kept_ND, grads[0][:live], *grads[1:]]


def plain(case, activation, weighted, upstream_ND, dtype=None):
    """The same by autograd through torch's own operators, an expert at a time, in `dtype` (fp64 by default)."""
    dtype = dtype or torch.float64
    leaves = [t.detach().to(dtype).requires_grad_() for t in case[:4]]
    rows_ND, up_EGD, down_EDF, weights_TK = leaves
    live = int(case.offsets[-1])
    parts = []
    for e in range(len(up_EGD)):
        rows = slice(int(case.offsets[e]), int(case.offsets[e + 1]))
        hidden = rows_ND[rows] @ up_EGD[e].T
        if activation == "gelu":
            h = F.gelu(hidden)
        else:
            gate, up = hidden.chunk(2, -1)
            h = F.silu(gate) * up
        out = h @ down_EDF[e].T
        if weighted:
            out = out * weights_TK.flatten()[case.perm_N.long()][rows, None]
        parts.append(out)
    out_ND = torch.cat(parts)
    wanted = leaves if weighted else leaves[:3]
    grads = torch.autograd.grad(out_ND, wanted, upstream_ND[:live].to(dtype), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]
    return [out_ND.detach(), grads[0][:live], *grads[1:]]
