"""Lightning's own tuners on our modules: the size and the rate that they find are those that training uses."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from moe_lightning.data import TextDataModule
from moe_lightning.training.modules import MLPModule
from moe_lightning.training.optimizer import OptimizerConfig


class Recorder(MLPModule):
    """Keeps its batches."""

    def __init__(self, **kwargs):
        super().__init__(320, 8, optimizer=OptimizerConfig(warmup_steps=1), **kwargs)
        self.batches: list[torch.Tensor] = []
        self.rates: list[float] = []

    def training_step(self, tokens, batch_idx):
        self.batches.append(tokens)
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(tokens, batch_idx)

    def take(self) -> list[list]:
        taken, self.batches = [batch.tolist() for batch in self.batches], []
        return taken


@pytest.fixture
def data(tmp_path, text_file) -> TextDataModule:
    return TextDataModule(text_file, seq_len=16, batch_size=4, cache_dir=tmp_path / "cache", max_val_tokens=64)


def trainer(tmp_path, **options) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
            **quiet,
            **options,
        }
    )


def test_the_batch_size_that_a_tuner_finds_is_the_one_trained_with(tmp_path, data):
    model, fit = Recorder(), trainer(tmp_path)
    found = Tuner(fit).scale_batch_size(model, datamodule=data, init_val=2, max_trials=4, steps_per_trial=1)
    assert found == data.batch_size == data.hparams["batch_size"] == 16
    tried = [len(batch) for batch in model.take()]
    assert tried[-1] == 16
    fit.fit(model, datamodule=data)
    assert [len(batch) for batch in model.take()] == [16, 16, 16]
    fit.validate(model, datamodule=data, verbose=False)


def test_the_batch_size_finder_in_a_fit_sets_that_fits_batches(tmp_path, data):
    model = Recorder()
    finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=3)
    trainer(tmp_path, callbacks=[finder]).fit(model, datamodule=data)
    assert [len(batch) for batch in model.take()][-3:] == [8, 8, 8]


@pytest.mark.parametrize("holder", ["attribute", "hparams"])
def test_a_batch_size_set_by_hand_is_used(tmp_path, data, holder):
    if holder == "attribute":
        data.batch_size = 8
    else:
        data.hparams["batch_size"] = 8
    model = Recorder()
    trainer(tmp_path).fit(model, datamodule=data)
    assert [len(batch) for batch in model.take()] == [8, 8, 8]
    with pytest.raises(ValueError, match=r"^data: batch_size must be .* got batch_size=0"):
        data.batch_size = 0


def test_the_learning_rate_that_a_tuner_finds_is_the_one_trained_with(tmp_path, data):
    model, fit = Recorder(), trainer(tmp_path)
    before = model.network.state_dict()["embedding.weight"].clone()
    found = Tuner(fit).lr_find(model, datamodule=data, num_training=15, max_lr=0.01).suggestion()
    assert torch.equal(model.network.state_dict()["embedding.weight"], before)
    assert model.learning_rate == model.optimizer_config.learning_rate == found
    assert model.hparams["optimizer"]["learning_rate"] == found
    model.rates.clear()
    fit.fit(model, datamodule=data)
    assert model.rates[0] == found  # a warm-up of one step


def test_the_learning_rate_finder_in_a_fit_sets_that_fits_rate(tmp_path, data):
    model = Recorder()
    finder = LearningRateFinder(num_training_steps=15, max_lr=0.01)
    trainer(tmp_path, callbacks=[finder]).fit(model, datamodule=data)
    assert model.learning_rate == finder.optimal_lr.suggestion() != OptimizerConfig().learning_rate
    # 3 steps, the first of them warm-up, then 0.1 + 0.45 (1 + cos(pi i / 2))
    assert model.rates[-3:] == pytest.approx([model.learning_rate * share for share in (1.0, 1.0, 0.55)])


def test_two_fits_on_one_datamodule_go_through_the_data_together(tmp_path, data):
    whole = Recorder()
    trainer(tmp_path, max_steps=6).fit(whole, datamodule=data)
    whole = whole.take()
    again = TextDataModule(**data.hparams)
    parts = []
    for _ in range(2):
        model = Recorder()
        trainer(tmp_path).fit(model, datamodule=again)
        parts += model.take()
    assert parts == whole


def test_a_fit_after_a_fit_of_one_trainer_goes_on_too(tmp_path, data):
    whole, model = Recorder(), Recorder()
    trainer(tmp_path, max_steps=6).fit(whole, datamodule=TextDataModule(**data.hparams))
    both = trainer(tmp_path)
    both.fit(model, datamodule=data)
    both.fit_loop.epoch_loop.max_steps = 6
    both.fit(model, datamodule=data)
    assert model.take() == whole.take()
