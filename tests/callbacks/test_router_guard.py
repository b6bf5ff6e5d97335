"""A router that sees NaN stops the run with one error, on every rank, and spoilt weights are never saved."""

import math
import os

import lightning as L
import pytest
import torch
from guard_processes import poisoned_rank
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_fit import fit
from tiny_run import error_line

from moe_lightning.callbacks import RouterGuard
from moe_lightning.callbacks.base import moe_layers

ERROR = r"^router: logits must be finite with at least top_k experts unmasked, got 32 invalid rows in a batch; "


class Poison(L.Callback):
    """Puts one NaN into a gate before batch `at`, or right after it."""

    def __init__(self, at, after=False):
        self.at, self.after = at, after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.at and not self.after:
            self.spoil(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.at and self.after:
            self.spoil(module)

    def spoil(self, module):
        with torch.no_grad():
            moe_layers(module)[-1].router.weight[1, 3] = math.nan


def spoilt(folder):
    paths = list(folder.glob("**/*.ckpt"))
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    return [
        path.name
        for path, state in zip(paths, states, strict=True)
        if not all(torch.isfinite(v).all() for v in state.values())
    ]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_nan_stops_the_run_before_the_next_checkpoint(tmp_path, accumulated):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    with pytest.raises(ValueError, match=ERROR):
        fit([save, RouterGuard(), Poison(at=4)], enable_checkpointing=True, accumulate_grad_batches=accumulated)
    assert {path.name for path in tmp_path.iterdir()} == {
        "last.ckpt",
        *(f"step={i}.ckpt" for i in range(1, 4 // accumulated + 1)),
    }
    assert spoilt(tmp_path) == []


def test_nan_found_in_validation_is_not_saved(tmp_path):
    """The weights go bad in the last step before a validation, whose end saves a checkpoint."""
    save = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1, save_last=True)
    with pytest.raises(ValueError, match=r"^router: logits must be finite"):
        fit(
            [Poison(at=3, after=True), save, RouterGuard()],
            validation=2,
            val_check_interval=2,
            enable_checkpointing=True,
        )
    assert spoilt(tmp_path) == []


def test_nan_in_the_last_step_is_found(tmp_path):
    with pytest.raises(ValueError, match=ERROR):
        fit([RouterGuard(), Poison(at=7)])


def test_sound_run_and_dense_model_go_through():
    from moe_lightning.training.modules import MLPModule

    assert fit([RouterGuard()], batches=3)[1].global_step == 3
    assert fit([RouterGuard()], MLPModule(64, 16), batches=3)[1].global_step == 3


def test_without_the_guard_nan_goes_unseen():
    assert fit([Poison(at=4)], batches=6)[1].global_step == 6


class FakeCopied:
    def __init__(self):
        self.waited = 0

    def synchronize(self):
        self.waited += 1


def test_on_a_gpu_the_count_is_read_one_step_late(monkeypatch):
    """The count of a step is waited for at the next step, or where a checkpoint is about to be written."""
    from moe_lightning.callbacks import router_guard

    events = []

    def start_copy(count):
        events.append(FakeCopied())
        return count, events[-1]

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(router_guard, "copy_to_host", start_copy)
    guard = RouterGuard()
    guard.layers = ["a layer"]
    monkeypatch.setattr(guard, "invalid_rows", lambda: torch.tensor(count).as_subclass(OnGpu))
    count = 0
    guard.on_train_batch_end(None, None, None, None, 0)
    assert [event.waited for event in events] == [0]
    count = 5
    guard.on_train_batch_end(None, None, None, None, 1)
    assert [event.waited for event in events] == [1, 0]
    with pytest.raises(ValueError, match="got 5 invalid rows"):
        guard.on_save_checkpoint(None, None, {})
    assert [event.waited for event in events] == [1, 1]
    guard.on_train_end(None, None)  # said once


def test_command_line_says_it_in_one_line(folder, capsys, monkeypatch):
    step = L.Trainer.fit

    def poisoned(trainer, model, *args, **kwargs):
        Poison(at=0).spoil(model)
        return step(trainer, model, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "fit", poisoned)
    save = ["--checkpoint.every_n_train_steps=1", "--checkpoint.monitor=null", "--trainer.logger=false"]
    line = error_line(capsys, "fit", "--trainer.max_steps=3", *save)
    assert line.startswith("router: logits must be finite")
    assert "32 invalid rows" in line
    assert not list(folder.glob("**/*.ckpt"))


@pytest.mark.slow
def test_nan_on_one_rank_stops_both(tmp_path):
    torch.multiprocessing.start_processes(poisoned_rank, (str(tmp_path),), 2, start_method="forkserver")
    said = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("at batch 2: router: logits must be finite")
    assert "got 64 invalid rows" in said[0]  # those of rank 1, in both layers, seen by both ranks
    assert os.listdir(tmp_path / "saved") == ["step=2.ckpt"]
