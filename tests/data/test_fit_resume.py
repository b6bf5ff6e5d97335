"""Training that is stopped and resumed sees the batches that it would have seen without the stop."""

from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from moe_lightning.data import TextDataModule

STEPS = 16  # 7 batches an epoch: two epochs and a bit


class Recorder(L.LightningModule):
    """Notes each step and its batch; fails inside step ``fail_at``."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.fail_at = fail_at
        self.seen = []

    def training_step(self, batch):
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append((self.global_step, batch.tolist()))
        return self.weight * batch.float().mean()

    def validation_step(self, batch):
        self.log("val_loss", batch.float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(tmp_path, text_file, steps=STEPS, ckpt_path=None, fail_at=None, callbacks=(), **options) -> list:
    model = Recorder(fail_at)
    data = TextDataModule(
        path=text_file, seq_len=99, batch_size=10, max_val_tokens=200, cache_dir=tmp_path / "cache", seed=5
    )
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "default_root_dir": tmp_path,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": bool(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    with nullcontext() if fail_at is None else pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model.seen


VALIDATION = {
    "none": {"limit_val_batches": 0},
    "end of epoch": {"num_sanity_val_steps": 2},
    "mid-epoch": {"val_check_interval": 3},
    "limited epochs": {"limit_train_batches": 4},
    "accumulation": {"accumulate_grad_batches": 2, "limit_val_batches": 0},
}


@pytest.mark.parametrize("options", VALIDATION.values(), ids=VALIDATION)
def test_resume_after_any_step_is_exact(tmp_path, text_file, options):
    every_step = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, text_file, callbacks=[every_step], **options)
    assert len({str(batch) for _, batch in whole[:7]}) == 7
    # in mid-epoch, around the ends of both epochs (7 and 14; 4 and 8 where limited), and near the end
    for stop in (1, 3, 4, 6, 7, 8, 13, 14, 15):
        resumed = fit(tmp_path, text_file, ckpt_path=tmp_path / "ckpt" / f"step={stop}.ckpt", **options)
        assert resumed == [entry for entry in whole if entry[0] >= stop], f"stopped after step {stop}"


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}], ids=["end of epoch", "mid-epoch"])
def test_resume_from_a_checkpoint_of_validation_is_exact(tmp_path, text_file, options):
    whole = fit(tmp_path, text_file, **options)
    best = ModelCheckpoint(tmp_path / "ckpt", "{step}", monitor="val_loss", save_top_k=-1)
    fit(tmp_path, text_file, callbacks=[best], **options)
    saved = sorted((tmp_path / "ckpt").iterdir())
    assert len(saved) >= 2
    for path in saved:
        stop = int(path.stem.split("=")[1])
        assert fit(tmp_path, text_file, ckpt_path=path, **options) == whole[stop:], f"stopped after step {stop}"


def test_resume_from_the_end_of_an_epoch_is_exact(tmp_path, text_file):
    epochs = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = fit(tmp_path, text_file, callbacks=[epochs], limit_val_batches=0)
    for stop in (7, 14):
        path = tmp_path / "ckpt" / f"step={stop}.ckpt"
        assert fit(tmp_path, text_file, ckpt_path=path, limit_val_batches=0) == whole[stop:]


@pytest.mark.parametrize("fail_at", [3, 7, 9])
def test_batch_of_a_failed_step_is_not_lost(tmp_path, text_file, fail_at):
    whole = fit(tmp_path, text_file, limit_val_batches=0)
    rescue = OnExceptionCheckpoint(tmp_path, "rescue")
    assert fit(tmp_path, text_file, fail_at=fail_at, callbacks=[rescue], limit_val_batches=0) == whole[:fail_at]
    resumed = fit(tmp_path, text_file, ckpt_path=tmp_path / "rescue.ckpt", limit_val_batches=0)
    assert resumed == whole[fail_at:]


def test_run_in_two_halves_is_the_whole_run(tmp_path, text_file):
    whole = fit(tmp_path, text_file, limit_val_batches=0)
    last = ModelCheckpoint(tmp_path / "ckpt", "last", every_n_train_steps=10)
    first = fit(tmp_path, text_file, steps=10, callbacks=[last], limit_val_batches=0)
    second = fit(tmp_path, text_file, ckpt_path=tmp_path / "ckpt" / "last.ckpt", limit_val_batches=0)
    assert first + second == whole


def test_loaders_made_anew_every_epoch_go_on_where_they_were(tmp_path, text_file):
    whole = fit(tmp_path, text_file, limit_val_batches=0)
    assert fit(tmp_path, text_file, limit_val_batches=0, reload_dataloaders_every_n_epochs=1) == whole


def test_other_text_is_refused(tmp_path, text_file):
    last = ModelCheckpoint(tmp_path / "ckpt", "last", every_n_train_steps=3)
    fit(tmp_path, text_file, steps=3, callbacks=[last], limit_val_batches=0)
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(ValueError, match=r"^data: resume needs the checkpoint's text, got"):
        fit(tmp_path, text_file, ckpt_path=tmp_path / "ckpt" / "last.ckpt", limit_val_batches=0)
