"""Load of the experts as a torchmetrics Metric.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ExpertLoadSummary:
    """Figures of each layer, fp32 (L), and the counts they are of, int64 (L, E); NaN where nothing was counted.

    No tuple: torchmetrics would squeeze the tensors of a one-layer model in it.
    """

    def __init__(self, counts_LE: Tensor, slots_L: Tensor) -> None:
        load_LE = counts_LE.float()
        mean_L = load_LE.mean(1)
        self.counts_LE = counts_LE
        self._slots_L = slots_L
        #: Load of the fullest expert over the mean load: 1 is balanced, E is all to one.
        self.max_over_mean_L = load_LE.amax(1) / mean_L
        #: MaxVio of loss-free balancing (arXiv:2408.15664): what the fullest expert has above the mean, over the mean.
        self.max_violation_L = self.max_over_mean_L - 1
        #: Coefficient of variation: population standard deviation over mean; 0 is balanced.
        self.cv_L = load_LE.std(1, correction=0) / mean_L
        #: Experts that got no token.
        self.dead_experts_L = (counts_LE == 0).sum(1).float()
        #: Share of slots over an expert's capacity; where a token's experts vary in number, of T * K not taken.
        self.dropped_L = (1 - load_LE.sum(1) / slots_L).clamp_min(0)

    def of_ranks(self, ranks: int) -> ExpertLoadSummary:
        """The same of ranks that hold E / ranks neighbouring experts each."""
        counts_LW = self.counts_LE.view(self.counts_LE.shape[0], ranks, -1).sum(2)
        return ExpertLoadSummary(counts_LW, self._slots_L)


class ExpertLoad(Metric):
    """Sums tokens per expert; ranks are combined by adding counts, never by averaging ratios.

    Args:
        num_layers: L.
        num_experts: E.
    """

    full_state_update = False
    counts_LE: Tensor
    slots_L: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.add_state("counts_LE", counts, dist_reduce_fx="sum")
        self.add_state("slots_L", torch.zeros(num_layers, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens_per_expert_LE: Tensor, slots_L: Tensor) -> None:
        """Add one batch: counts (L, E), and the T * K slots that were offered to each layer (L), or the same to all."""
        self.counts_LE += tokens_per_expert_LE
        self.slots_L += slots_L.to(self.slots_L.device, non_blocking=True)

    def compute(self) -> ExpertLoadSummary:
        """Figures over all batches and ranks since the last reset; NaN before the first."""
        return ExpertLoadSummary(self.counts_LE.clone(), self.slots_L)
