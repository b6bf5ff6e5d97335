"""The MoE layer in a LightningModule of your own, with the callbacks that time its routing and watch its load.

python examples/own_module.py
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from moe_lightning import (
    ExpertLoadMonitor,
    Experts,
    FusedSelect,
    MoE,
    RouterGuard,
    RouterTiming,
    RunSummary,
    load_balancing_loss,
)


class Classifier(L.LightningModule):
    def __init__(self, d_model: int = 32, num_experts: int = 8, top_k: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(d_model, d_model)
        router = FusedSelect(d_model, num_experts, top_k)
        self.moe = MoE(router, Experts(d_model, hidden_dim=64, num_experts=num_experts))
        self.head = nn.Linear(d_model, classes)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        points, label_T = batch
        x_TD = self.stem(points)
        y_TD, routing = self.moe(x_TD)
        loss = cross_entropy(self.head(x_TD + y_TD), label_T)
        self.log("loss", loss, prog_bar=True)
        return loss + 0.01 * load_balancing_loss(routing)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def data(tokens: int = 8192, d_model: int = 32, clusters: int = 8, classes: int = 4) -> TensorDataset:
    """Points of eight clusters; each cluster labels its points by a linear map of its own."""
    centres = 3 * torch.randn(clusters, d_model)
    maps = torch.randn(clusters, d_model, classes)
    cluster_T = torch.randint(clusters, (tokens,))
    offset_TD = torch.randn(tokens, d_model)
    label_T = torch.einsum("td,tdc->tc", offset_TD, maps[cluster_T]).argmax(1)
    return TensorDataset(centres[cluster_T] + offset_TD, label_T)


def main() -> float:
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=4,
        callbacks=[RouterTiming(), ExpertLoadMonitor(), RouterGuard(), RunSummary()],
        logger=False,  # RunSummary prints; a logger gets every figure over the steps
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), DataLoader(data(), batch_size=256, shuffle=True))
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    main()
