"""`mlp`: two linear maps, and the smallest language model made of them."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lightning.models.decoder import LMHidden, LMOutput
from moe_lightning.utils.checks import check_sizes
from moe_lightning.utils.memory import check_fits_memory


class MLP(nn.Module):
    """Linear, GELU, Linear, all `hidden` wide: (..., hidden) -> (..., hidden)."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        check_sizes("mlp", hidden=hidden)
        check_fits_memory("mlp", 2 * hidden**2, hidden=hidden)
        self.first = nn.Linear(hidden, hidden)
        self.second = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The last dimension is mapped."""
        return self.second(nn.functional.gelu(self.first(x)))


class MLPDecoder(nn.Module):
    """Predicts the next token from the current one alone: what context must beat. Token ids (B, S) -> `LMOutput`."""

    def __init__(self, vocab_size: int, d_model: int = 128) -> None:
        super().__init__()
        check_sizes("mlp", vocab_size=vocab_size, d_model=d_model)
        check_fits_memory("mlp", 2 * (vocab_size + d_model) * d_model, vocab_size=vocab_size, d_model=d_model)
        self.vocab_size = vocab_size
        self.architecture = {"model": "mlp", "vocab_size": vocab_size, "d_model": d_model}
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.mlp = MLP(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens_BS: Tensor, logits: bool = True) -> LMOutput | LMHidden:
        """Logits of the next token at every position; without `logits`, what `head` would make them of."""
        x_BSD = self.embedding(tokens_BS)
        x_BSD = x_BSD + self.mlp(x_BSD)
        return LMOutput(self.head(x_BSD)) if logits else LMHidden(x_BSD)

    def flops_per_token(self, seq_len: int) -> float:
        """Useful forward FLOPs of one token: two a weight it meets, whatever `seq_len`."""
        return 2.0 * (sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel())
