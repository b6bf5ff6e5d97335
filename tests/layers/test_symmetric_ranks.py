"""Ranks that write to each other's memory: as by exchanges and on one rank; graphs; a rank that is gone."""

import pytest
import symmetric_processes
import torch
import torch.multiprocessing as mp

from moe_lightning.ops import native

CHECKS = [name for name in vars(symmetric_processes) if name.startswith("check_")]
#: What the CPU can show: it has no graphs, nothing runs beside anything, and the group's own timeout ends a wait.
ON_CPU = ("check_one_rank", "check_passes_alive", "check_frozen_tokens")


def run(check, world, folder, device):
    mp.start_processes(
        symmetric_processes.rank_process, (world, str(folder), check, device), world, start_method="spawn"
    )


@pytest.mark.slow
@pytest.mark.parametrize("check", ON_CPU)
def test_on_the_cpu(check, tmp_path):
    run(check, 2, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(native.missing("cuda") is not None, reason=f"{native.missing('cuda')}")
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpus(check, world, tmp_path):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, torch sees {torch.cuda.device_count()}")
    run(check, world, tmp_path, "cuda")
