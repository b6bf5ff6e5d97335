"""Launches every kernel in each of its shapes, once, on small inputs: what compute-sanitizer watches."""

import torch

from moe_lightning.ops import build_index, permute, select, sinkhorn, unpermute

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZES = ((8, 2), (19, 3), (64, 2), (64, 8), (100, 1), (128, 4), (256, 8), (512, 12), (1024, 32))  # experts, top_k
WEIGHTINGS = (("softmax", True), ("softmax", False), ("sigmoid", True))


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
            balanced = select(logits_TE, top_k, "native", ranks_TE=sinkhorn(logits_TE, 3))
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
    print(f"every kernel ran: {seen}")


if __name__ == "__main__":
    main()
