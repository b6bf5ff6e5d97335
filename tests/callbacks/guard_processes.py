"""What a rank of the guard's test runs, imported there."""

import math
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_fit import Batches, tiny_model

from moe_lightning.callbacks import RouterGuard
from moe_lightning.callbacks.base import moe_layers


class PoisonOneRank(L.Callback):
    """The gate of rank 1, and no other, gets a NaN before batch 2."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch_idx = batch_idx
        if batch_idx == 2 and dist.get_rank() == 1:
            with torch.no_grad():
                moe_layers(module)[0].router.weight[0, 0] = math.nan


def poisoned_rank(rank: int, folder: str) -> None:
    """Train in a gloo group of two; write what stopped it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), world_size=2, rank=rank)
    poison = PoisonOneRank()
    save = [ModelCheckpoint(f"{folder}/saved", "{step}", every_n_train_steps=2, save_top_k=-1)] if rank == 0 else []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[poison, RouterGuard(), *save],
        enable_checkpointing=rank == 0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    try:
        trainer.fit(tiny_model(), Batches(4, seed=rank))
        said = "went through"
    except ValueError as error:
        said = f"at batch {poison.batch_idx}: {error}"
    Path(folder, f"rank-{rank}").write_text(said)
    dist.destroy_process_group()
