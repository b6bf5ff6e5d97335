"""Ctrl-C and SIGTERM in a run of one process: a checkpoint, the table, status 130 or 143, the handlers of before."""

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_fit import Batches, fit, tiny_model

from moe_lightning.callbacks import GracefulStop, RunSummary


class Terminate(L.Callback):
    """Sends itself a signal in the middle of a batch."""

    number = signal.SIGTERM

    def __init__(self, hook, batch=2):
        setattr(self, hook, lambda *arguments: self._maybe(batch, *arguments))

    def _maybe(self, batch, trainer, *arguments):
        if trainer.global_step >= batch or trainer.state.fn != "fit":
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.getsignal(signal.SIGINT)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (signal.SIG_DFL, before[1])
    signal.signal(signal.SIGTERM, before[0])


def test_a_run_that_is_not_stopped_leaves_no_handler():
    _, trainer, _ = fit([GracefulStop()], validation=1)
    assert trainer.global_step == 8


def test_training_stops_after_the_step_with_a_checkpoint(tmp_path):
    save = ModelCheckpoint(tmp_path / "saved", save_top_k=0)
    callbacks = [GracefulStop(), Terminate("on_train_batch_start"), save]
    with pytest.raises(SystemExit) as stop:
        fit(callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    assert stop.value.code == 143
    [path] = (tmp_path / "saved").glob("stopped-step=*.ckpt")
    assert path.name == "stopped-step=3.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 3


def test_a_signal_before_training_stops_it_before_the_first_step():
    callbacks = [GracefulStop(), Terminate("on_validation_batch_start", batch=0)]
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SystemExit) as stop:
        fit(callbacks, model, validation=2, num_sanity_val_steps=1)
    assert stop.value.code == 143
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_with_its_table(capsys, number, status):
    stop_it = Terminate("on_train_batch_start")
    stop_it.number = number
    with pytest.raises(SystemExit) as stop:
        fit([GracefulStop(), RunSummary(), stop_it])
    assert stop.value.code == status
    assert capsys.readouterr().out.split()[0] == "result"


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    callback = GracefulStop()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        callback._set_flag(number, None)
    assert statuses == [130]


def test_validation_alone_ends_at_once(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[GracefulStop(), Terminate("on_validation_batch_start")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(SystemExit) as stop:
        trainer.validate(tiny_model(), Batches(2), verbose=False)
    assert stop.value.code == 143
