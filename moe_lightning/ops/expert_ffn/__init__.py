"""The experts' feed-forward network over rows sorted by expert, ``down(act(up(x)))``, forward and backward.

`reference` computes it in torch, `kernels` on a GPU, and `functional` is the differentiable call over both.
"""

from moe_lightning.ops.expert_ffn.functional import RowWeights, expert_ffn
from moe_lightning.ops.expert_ffn.kernels import Added, missing

__all__ = ["Added", "RowWeights", "expert_ffn", "missing"]
