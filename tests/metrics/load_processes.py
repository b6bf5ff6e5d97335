"""What a rank of the load's test runs, imported there."""

import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_lightning.metrics import ExpertLoad


def hot_rank(rank: int, folder: str) -> None:
    """All of this rank's 16 slots of both layers go to the expert of its own number, which drops 4."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), world_size=2, rank=rank)
    metric = ExpertLoad(2, 4)
    counts = torch.zeros(2, 4, dtype=torch.int32)
    counts[:, rank] = 12
    metric.update(counts, torch.tensor(16))
    summary = metric.compute()
    seen = {
        "max_over_mean": summary.max_over_mean_L.tolist(),
        "cv": summary.cv_L.tolist(),
        "dead": summary.dead_experts_L.tolist(),
        "dropped": summary.dropped_L.tolist(),
        "counts": summary.counts_LE.tolist(),
        "own_counts_after": metric.counts_LE.tolist(),
    }
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
