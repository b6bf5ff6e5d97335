"""The kernels alone in a plain torch loop: select, build_index, permute, expert_ffn, unpermute.

python examples/plain_loop.py

Legend: T tokens, D width, F hidden size, E experts, K top_k, N = T * K slots.
"""

import torch
from torch import Tensor

from moe_lightning import build_index, expert_ffn, permute, select, unpermute

T, D, F, E, K = 512, 64, 128, 8, 2


def moe_layer(x_TD: Tensor, gate_ED: Tensor, up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Differentiable. On a GPU in fp16 or bf16 all of it runs in kernels, and the host reads nothing."""
    logits_TE = x_TD @ gate_ED.T
    selection = select(logits_TE, top_k=K)  # weights_TK, expert_ids_TK, tokens_per_expert_E, invalid_rows
    index = build_index(selection.expert_ids_TK, num_experts=E)  # expert_offsets, perm_N, inverse_perm_N
    rows_ND = permute(x_TD, index, top_k=K)
    rows_ND = expert_ffn(rows_ND, up_EGD, down_EDF, index.expert_offsets, activation="swiglu")
    return unpermute(rows_ND, selection.weights_TK, index)


def main(steps: int = 40, device: str = "cuda" if torch.cuda.is_available() else "cpu") -> list[float]:
    torch.manual_seed(0)
    x_TD, target_TD = torch.randn(2, T, D, device=device)
    shapes = ((E, D), (E, 2 * F, D), (E, D, F))  # gate; gate and up projections of SwiGLU; down projection
    weights = [torch.nn.Parameter(0.1 * torch.randn(shape, device=device)) for shape in shapes]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (moe_layer(x_TD, *weights) - target_TD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()  # one read at the end
    print(f"loss {values[0]:.3f} -> {values[-1]:.3f} in {steps} steps on {device}")
    return values


if __name__ == "__main__":
    main()
