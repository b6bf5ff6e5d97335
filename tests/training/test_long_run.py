"""A thousand steps of one process: what it holds at the end is what it held after a hundred. Catalogue row 56."""

import gc
import os
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_run import run_cli


class Held(L.Callback):
    """By step: live tensors, descriptors, threads, and resident kilobytes."""

    def __init__(self):
        self.seen: dict[int, tuple[int, int, int, int]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (100, 1000):
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
            descriptors = len(os.listdir("/proc/self/fd"))
            self.seen[trainer.global_step] = tensors, descriptors, threading.active_count(), resident


held = Held()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system has no /proc")
def test_nothing_grows_in_a_thousand_steps(folder):
    flags = ["--trainer.max_steps=1000", "--trainer.max_epochs=-1", "--trainer.val_check_interval=50"]
    flags += ["--trainer.check_val_every_n_epoch=null", "--trainer.limit_val_batches=1", "--model.n_layers=1"]
    run_cli("fit", *flags, f"--trainer.callbacks+={__name__}.held_callback")
    (tensors, *counts, resident), (tensors_after, *counts_after, resident_after) = held.seen[100], held.seen[1000]
    assert counts_after == counts
    assert tensors_after <= tensors + 8  # the batch, the loss and what is logged, of this step and the last
    assert resident_after - resident < 16 * 1024


def held_callback() -> L.Callback:
    """What the command line is given."""
    return held
