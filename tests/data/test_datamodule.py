from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from moe_lightning.data import TextDataModule

BAD = {
    "seq_len": [0, -1, 1.0, float("nan"), "256", True, None],
    "batch_size": [0, -16, float("inf"), "16", False],
    "max_val_tokens": [0, -1, 2.5],
    "seed": [-1, 0.5, None],
    "num_workers": [-1, "0", 65, 1000],
    "vocab_size": [0, -1, 256, 4096, float("nan"), 257.0],
    "tokenizer": ["byte", None, 3],
    "path": ["", " ", 3, "a\0*"],
    "cache_dir": ["", None],
    "prompt": [[], None, 3, [1], ["a", None]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_argument_is_one_line_before_any_file_is_read(monkeypatch, name, value):
    def touch(*args, **kwargs):
        pytest.fail("touched a file")

    with monkeypatch.context() as files:
        for read in ("read_bytes", "open", "mkdir", "exists"):
            files.setattr(Path, read, touch)
        with pytest.raises(ValueError, match=rf"^data: {name} must be .*, got ") as error:
            TextDataModule(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [256, 0, -1, 1 << 40, 4096.0])
def test_bad_bpe_size_is_one_line(value):
    with pytest.raises(ValueError, match=r"^data: vocab_size must be (in \[257, 1048576\]|an integer), got"):
        TextDataModule(tokenizer="bpe", vocab_size=value)


def test_vocab_size_is_known_before_the_data():
    assert TextDataModule(path="missing").vocab_size == 257
    assert TextDataModule(path="missing", tokenizer="bpe").vocab_size == 4096
    assert TextDataModule(path="missing", tokenizer="bpe", vocab_size=32000).vocab_size == 32000


def make(path, tmp_path, **options) -> TextDataModule:
    return TextDataModule(**{"path": path, "seq_len": 16, "batch_size": 4, "cache_dir": tmp_path / "cache", **options})


def test_every_split_gives_batches(text_file, tmp_path):
    data = make(text_file, tmp_path)
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch.shape == (4, 17)
        assert batch.dtype == torch.int64
    assert data.decode(batch[0]) in text_file.read_text()


def test_validation_is_limited(text_file, tmp_path):
    assert len(make(text_file, tmp_path).val_dataloader()) == 6  # of 4 windows, the last of 3
    assert len(make(text_file, tmp_path, max_val_tokens=128).val_dataloader()) == 2


def test_too_short_corpus_names_the_split(text_file, tmp_path):
    with pytest.raises(ValueError, match=r"^data: the train split is too short, got 7201 tokens, needs 8004"):
        make(text_file, tmp_path, seq_len=2000).setup("fit")
    data = make(text_file, tmp_path, seq_len=401)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^data: the validation split is too short, got 401 tokens, needs 402"):
        data.val_dataloader()


def test_absurd_sizes_are_too_long_and_not_out_of_memory(text_file, tmp_path):
    with pytest.raises(ValueError, match=r"^data: the train split is too short"):
        make(text_file, tmp_path, seq_len=2**31 - 1, batch_size=2**31 - 1).setup("fit")


class Echo(L.LightningModule):
    """Predicts the prompt's text."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch):
        return self.weight * batch.float().mean()

    def predict_step(self, batch):
        assert batch.shape[0] == 1
        return self.trainer.datamodule.decode(batch[0])

    def validation_step(self, batch):
        self.log("largest", float(batch.max()), reduce_fx="max")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer(tmp_path, **options) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 2,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **options,
        }
    )


def save_checkpoint(data, tmp_path) -> str:
    fit = trainer(tmp_path)
    fit.fit(Echo(), datamodule=data)
    path = str(tmp_path / "model.ckpt")
    fit.save_checkpoint(path)
    torch.load(path, weights_only=True)
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_predict_needs_the_checkpoint_and_not_the_corpus(text_file, tmp_path, tokenizer):
    path = save_checkpoint(make(text_file, tmp_path, tokenizer=tokenizer), tmp_path)
    data = TextDataModule(
        path=str(tmp_path / "gone"),
        tokenizer="bpe",
        vocab_size=300,
        cache_dir=str(tmp_path / "never"),
        prompt=["héllo", "b" * 300],
    )
    predicted = trainer(tmp_path).predict(Echo(), datamodule=data, ckpt_path=path, weights_only=True)
    assert predicted == ["héllo", "b" * 300]
    assert data.vocab_size == {"bytes": 257, "bpe": 4096}[tokenizer]
    assert not (tmp_path / "never").exists()


def test_predict_with_a_bpe_and_no_checkpoint_says_what_is_missing(tmp_path):
    data = TextDataModule(tokenizer="bpe", cache_dir=str(tmp_path / "never"))
    with pytest.raises(ValueError, match=r"tokenizer='bpe' must come from a checkpoint to predict, got none"):
        trainer(tmp_path).predict(Echo(), datamodule=data)


def test_empty_prompt_is_end_of_text():
    data = TextDataModule(prompt="")
    assert [batch.tolist() for batch in data.predict_dataloader()] == [[[256]]]
    assert len(data.predict_dataloader()) == 1


def test_lightning_has_no_dataloader_to_put_a_distributed_sampler_in(text_file, tmp_path):
    data = make(text_file, tmp_path)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
    assert not any(isinstance(loader, DataLoader) for loader in loaders)


def test_other_text_is_evaluated_with_the_checkpoints_tokens(text_file, folder, tmp_path):
    trained = make(text_file, tmp_path, tokenizer="bpe", vocab_size=300)
    path = save_checkpoint(trained, tmp_path)
    other = make(folder, tmp_path, tokenizer="bpe", vocab_size=1000)
    largest = trainer(tmp_path, limit_val_batches=None).validate(Echo(), other, path, weights_only=True)
    assert largest[0]["largest"] < 300
    assert other.vocab_size == 300
    assert other.state_dict() == trained.state_dict()


def test_checkpoint_restores_the_datamodule_by_itself(text_file, tmp_path):
    path = save_checkpoint(make(text_file, tmp_path, tokenizer="bpe", vocab_size=300), tmp_path)
    data = TextDataModule.load_from_checkpoint(path, weights_only=True)
    assert data.vocab_size == 300
    assert data.decode(next(iter(data.predict_dataloader()))[0]) == "def "


def test_overfitting_repeats_the_same_batches(text_file, tmp_path):
    seen = []

    class Watch(Echo):
        def training_step(self, batch):
            seen.append(batch.tolist())
            return super().training_step(batch)

    trainer(tmp_path, overfit_batches=2, max_steps=6).fit(Watch(), datamodule=make(text_file, tmp_path))
    assert seen[:2] == seen[2:4] == seen[4:6]
    assert seen[0] != seen[1]


def test_data_settings_are_logged_and_a_model_may_log_a_vocab_size_of_its_own(text_file, tmp_path):
    class Sized(Echo):
        def __init__(self, vocab_size=257):
            super().__init__()
            self.save_hyperparameters()

    logger = CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger).fit(Sized(), datamodule=make(text_file, tmp_path))
    logged = {"path": str(text_file), "tokenizer": "bytes", "seq_len": 16, "batch_size": 4, "seed": 0}
    assert dict(logger.experiment.hparams) == {"vocab_size": 257, "max_val_tokens": 131_072, **logged}
