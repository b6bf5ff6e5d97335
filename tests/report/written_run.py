"""A run's folder with the figures that a test needs, as training writes it."""

import json
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from moe_lightning.callbacks.expert_load import COUNTS_TAG


def write_run(
    folder: Path,
    router: str,
    steps: int,
    losses: dict[int, float] | None = None,
    evaluated: dict[int, float] | None = None,
    counts: dict[int, list[list[int]]] | None = None,
    batch_size: int = 4,
    data: str = "text.txt",
    machine: str = "a CPU",
    summary: dict | None = None,
) -> Path:
    """`losses` of validation, its CV `evaluated` and `counts` in training, by optimizer steps taken; seq_len 32."""
    folder.mkdir(parents=True)
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, steps + 1):
            writer.add_scalar("train/loss", 9.0, step - 1)  # as Lightning counts them
        for step, loss in (losses or {}).items():
            writer.add_scalar("val/loss", loss, step - 1)
        for step, cv in (evaluated or {}).items():
            writer.add_scalar("expert_load_val/cv", cv, step - 1)
            writer.add_scalar("expert_load_val/max_over_mean", 1 + cv, step - 1)
        for step, counts_LE in (counts or {}).items():
            writer.add_tensor(COUNTS_TAG, torch.tensor(counts_LE, dtype=torch.int32), step - 1)
    of_times = {"T_route": 2.0, "T_experts": 5.0}
    found = {"router": router, "steps": steps, "step_ms": 10.0, "times_ms": of_times, "tokens_per_second": 900.0}
    (folder / "summary.json").write_text(json.dumps({**found, **(summary or {})}))
    card = {"command": "python train.py fit", "machine": {"cpu": machine, "cores": 2, "gpus": []}, "ranks": 1}
    (folder / "run.json").write_text(json.dumps(card))
    model = {"class_path": "moe_lightning.training.modules.DecoderMoEModule", "init_args": {"d_model": 32}}
    settings = {"path": data, "seq_len": 32, "batch_size": batch_size}
    trainer = {"accumulate_grad_batches": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": settings, "trainer": trainer}))
    return folder
