"""Launches every kernel in each of its shapes, once, on small inputs: what compute-sanitizer watches."""

import torch

from moe_lightning.ops import build_index, permute, select, sinkhorn, unpermute

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    """Forward and backward; counts are read, so that nothing stays unfinished."""
    torch.manual_seed(0)
    seen = 0
    for dtype in DTYPES:
        for experts, top_k in ((8, 2), (19, 3), (64, 2), (64, 8), (100, 1), (128, 4), (256, 8), (512, 12), (1024, 32)):
            for tokens in (1, 33, 1000):
                logits_TE = torch.randn(tokens, experts, device="cuda").to(dtype).requires_grad_()
                for score, renormalize in (("softmax", True), ("softmax", False), ("sigmoid", True)):
                    selection = select(logits_TE, top_k, "native", score=score, renormalize=renormalize)
                    selection.weights_TK.square().sum().backward()
                ranks_TE = sinkhorn(logits_TE, 3)
                balanced = select(logits_TE, top_k, "native", ranks_TE=ranks_TE)
                index = build_index(balanced.expert_ids_TK, experts, "native")
                x_TD = torch.randn(tokens, 24, device="cuda").to(dtype).requires_grad_()
                y_TD = unpermute(permute(x_TD, index, top_k, True), balanced.weights_TK, index, True)
                y_TD.sum().backward()
                seen += int(balanced.tokens_per_expert_E.sum()) + int(index.expert_offsets[-1])
    for tokens, experts in ((4096, 64), (20_000, 64)):  # clusters, grids
        sinkhorn(torch.randn(tokens, experts, device="cuda"), 2)
        seen += int(build_index(torch.randint(experts, (4 * tokens, 2), device="cuda").int(), experts).perm_N[-1])
    print(f"every kernel ran: {seen}")


if __name__ == "__main__":
    main()
