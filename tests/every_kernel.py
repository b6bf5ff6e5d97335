"""Launches every kernel in each of its shapes, once, on small inputs: what compute-sanitizer watches."""

import sys

import torch
from ops.symmetric_ranks import Ranks, draw_ids

from moe_lightning.ops import RowWeights, build_index, expert_ffn, permute, select, sinkhorn, sum_rows, unpermute
from moe_lightning.ops.ep_layout import (
    EpLayout,
    bucket_slots,
    merge_rows,
    recv_offsets,
    recv_permutation,
    send_counts,
    split_rows,
)
from moe_lightning.ops.expert_ffn import missing
from moe_lightning.ops.library import accum_dtype
from moe_lightning.ops.select import GAP_BINS
from moe_lightning.ops.symmetric import get

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZES = ((8, 2), (19, 3), (64, 2), (64, 8), (100, 1), (128, 4), (256, 8), (512, 12), (1024, 32))  # experts, top_k
WEIGHTINGS = (("softmax", True), ("softmax", False), ("sigmoid", True), ("sqrtsoftplus", False))


def main() -> None:
    """Forward and backward; counts are read, so that nothing stays unfinished."""
    torch.manual_seed(0)
    seen = 0
    for dtype in DTYPES:
        for i, (experts, top_k) in enumerate(SIZES):
            tokens = (33, 300, 1)[i % 3]
            logits_TE = torch.randn(tokens, experts, device="cuda").to(dtype).requires_grad_()
            for score, renormalize in WEIGHTINGS if dtype != torch.bfloat16 else WEIGHTINGS[:1]:
                selection = select(logits_TE, top_k, "native", score=score, renormalize=renormalize)
                selection.weights_TK.square().sum().backward()
            options = {"score": "sigmoid", "bias_E": torch.randn(experts, device="cuda"), "scaling_factor": 2.0}
            if experts % 4 == 0:
                select(logits_TE, top_k, "native", n_group=4, topk_group=3, **options)
            options["mask_T"] = torch.rand(tokens, device="cuda") < 0.5
            select(logits_TE, top_k, "native", gap_counts_BE=torch.zeros(GAP_BINS, experts, device="cuda"), **options)
            hostile_TE = logits_TE.detach().masked_fill(torch.rand_like(logits_TE) < 0.01, torch.nan).round()
            seen += int(select(hostile_TE, top_k, "native", **options).invalid_rows)
            balanced = select(logits_TE, top_k, "native", scores_TE=sinkhorn(logits_TE, 3))
            index = build_index(balanced.expert_ids_TK, experts, "native")
            x_TD = torch.randn(tokens, 24, device="cuda").to(dtype).requires_grad_()
            y_TD = unpermute(permute(x_TD, index, top_k, True), balanced.weights_TK, index, True)
            y_TD.sum().backward()
            seen += int(balanced.tokens_per_expert_E.sum()) + int(index.expert_offsets[-1])
    # Where many tokens change the shape: fewer lanes a row, runs of more rounds, grids in place of clusters.
    for experts in (64, 128):
        for dtype in (torch.float16, torch.float32):
            seen += int(select(torch.randn(9000, experts, device="cuda").to(dtype), 2).tokens_per_expert_E.sum())
    for tokens in (4096, 6000, 12_000, 60_000, 300_000):
        seen += int(build_index(torch.randint(64, (tokens, 2), device="cuda").int(), 64).perm_N[-1])
    for tokens, experts in ((4096, 64), (6000, 64), (3000, 256), (20_000, 64), (150_000, 64)):
        seen += int(sinkhorn(torch.randn(tokens, experts, device="cuda"), 2).isfinite().sum())
    if "--without_expert_kernels" not in sys.argv:
        seen += _expert_kernels()
    seen += _rows_between_ranks() + _row_counts()
    print(f"every kernel ran: {seen}")


def _rows_between_ranks() -> int:
    """Ranks that one device plays; rows of whole vectors and not, few tokens and none, dropped slots."""
    seen = 0
    for dtype in DTYPES:
        for counts, experts, width in (((40, 9), 8, 24), ((0, 300), 4, 1024), ((5, 0, 7, 64), 64, 3)):
            ranks, capacity = Ranks(len(counts), experts, "cuda"), len(counts) * max(counts) * 2
            rows = ranks.tensors((capacity, width), dtype)
            row_weights = ranks.tensors((capacity,), accum_dtype(dtype))
            routes, _ = ranks.routes(draw_ids(counts, experts, 2, "cuda", drop=0.1), capacity)
            x_WTD = [torch.randn(tokens, width, device="cuda").to(dtype) for tokens in counts]
            weights_WTK = [torch.rand(tokens, 2, dtype=accum_dtype(dtype), device="cuda") for tokens in counts]
            ranks.put(x_WTD, weights_WTK, routes, rows, row_weights)
            ranks.barrier()
            for rank, route in enumerate(routes):
                seen += sum(int(t.isfinite().all()) for t in get(rows[rank], row_weights[rank], route, dtype))
    return seen


def _row_counts() -> int:
    """Chunks and none, more experts of a rank than a warp has lanes, no tokens; and the rows brought into order."""
    seen = 0
    for tokens, sizes in ((300, (1, 3, 3, 40)), (33, (0, 2, 1, 4)), (0, (3, 4, 4, 256))):
        layout = EpLayout.of(*sizes)
        ids_TK = draw_ids((tokens,), layout.ranks * layout.local_experts, 2, "cuda", drop=0.1)[0]
        index = build_index(bucket_slots(ids_TK, layout), layout.buckets)
        send_WCL = send_counts(index.expert_offsets, layout)
        recv_WCL = send_WCL.flip(0).contiguous()
        totals_2CW, offsets_CL = recv_offsets(send_WCL, recv_WCL, layout)
        torch.cuda.synchronize()
        count, own = int(recv_WCL[:, 0].sum()), int(recv_WCL[layout.rank, 0].sum())
        perm = recv_permutation(recv_WCL, int(recv_WCL.sum()), layout)[:count]
        x = torch.randn(count, 24, device="cuda")
        seen += sum(
            int(table.isfinite().all()) for table in split_rows(merge_rows(x[own:], x[:own], perm), perm, count - own)
        )
        seen += int(totals_2CW.sum()) + int(offsets_CL.sum())
    return seen


def _expert_kernels() -> int:
    """Experts without rows, with a few, with more than a tile; dropped slots; sizes that end within a tile."""
    device, seen = torch.device("cuda", 0), 0
    for dtype in (torch.float16, torch.bfloat16):
        if reason := missing(dtype, device, 8, 8):
            print(f"no expert kernels: {reason}")
            return seen
        for activation, width in (("swiglu", 2), ("gelu", 1)):
            for d_model, hidden_dim in ((72, 136), (256, 320)):
                ids_TK = torch.tensor([-1, 0, 2, 2] + [3] * 150, device=device, dtype=torch.int32).view(-1, 2)
                index = build_index(ids_TK, 5, "native")
                sizes = (len(ids_TK) * 2, d_model), (5, width * hidden_dim, d_model), (5, d_model, hidden_dim)
                leaves = [torch.randn(*size, device=device).to(dtype).requires_grad_() for size in sizes]
                weights_TK = torch.rand(len(ids_TK), 2, device=device, requires_grad=True)
                row_weights = RowWeights(weights_TK, index.perm_N)
                out_ND = expert_ffn(*leaves, index.expert_offsets, activation, row_weights)
                sum_rows(out_ND, index, 2, True).sum().backward()
                seen += int(leaves[1].grad.isfinite().all())
    return seen


if __name__ == "__main__":
    main()
