"""A router of your own: DeepSeek-V3's sigmoid scores (arXiv:2412.19437, eq. 12-15), without its bias.

python examples/own_router.py
python train.py fit --config configs/quickstart.yaml --model.router examples.own_router.SigmoidTopK
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from moe_lightning import DecoderMoE, DecoderMoEConfig, Router, Selection, Tokens, select


class SigmoidTopK(Router):
    """Weights are sigmoids of the chosen logits, normalised to sum to `scale`."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, scale: float = 1.0, **kwargs: float) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        if scale <= 0:
            raise ValueError(f"own_router: scale must be positive, got {scale}; 1.0 is the usual one")
        self.scale = scale

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        selection = select(logits_TE, self.top_k, score="sigmoid")
        return selection._replace(weights_TK=self.scale * selection.weights_TK)


def main(steps: int = 30) -> list[float]:
    """Teach a small language model to count."""
    torch.manual_seed(0)
    router = partial(SigmoidTopK, scale=2.0)
    sizes = {"vocab_size": 32, "d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_dim": 64}
    model = DecoderMoE(DecoderMoEConfig(**sizes, router=router))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        token_ids = (torch.randint(32, (16, 1)) + torch.arange(17)) % 32
        logits = model(token_ids[:, :-1]).logits_BSV
        loss = cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
