"""A checkpoint is enough to make its module again, and every logger gets the run's hyperparameters."""

from functools import partial

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_run import DATA, MODEL, TRAINER, run_cli
from torch.utils.data import DataLoader

from moe_lightning.data import TextDataModule
from moe_lightning.routers import NaiveTopK, Sinkhorn
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.training.modules import DecoderMoEModule, MLPModule, TransformerDecoderModule
from moe_lightning.training.optimizer import OptimizerConfig
from moe_lightning.utils.checkpoint_file import load_checkpoint, save_checkpoint

TOKENS = torch.arange(24).view(2, 12)
SIZES = {"vocab_size": 320, "d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_dim": 16}
MODULES = {
    "mlp": lambda: MLPModule(320, 16, temperature=0.5),
    "transformer_decoder": lambda: TransformerDecoderModule(**SIZES, tie_embeddings=True),
    "decoder_moe": lambda: DecoderMoEModule(**SIZES, num_experts=4, top_k=1, balance_coef=0.5),
    "router class": lambda: DecoderMoEModule(**SIZES, router=NaiveTopK),
    "router with arguments": lambda: DecoderMoEModule(**SIZES, router=partial(Sinkhorn, iterations=3)),
    "optimizer": lambda: DecoderMoEModule(**SIZES, optimizer=OptimizerConfig(learning_rate=0.25, schedule="wsd")),
}
SAVE = ["--trainer.max_steps=1", "--checkpoint.monitor=null", "--checkpoint.every_n_train_steps=1"]
SAVE += ["--checkpoint.dirpath=saved", "--trainer.limit_val_batches=0", "--run_summary.enabled=false"]


def save(module: L.LightningModule, path) -> str:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def logits(module: LanguageModule) -> torch.Tensor:
    return module.eval()(TOKENS).logits_BSV


@pytest.mark.parametrize("kind", MODULES)
def test_load_from_checkpoint_gives_the_module_that_was_saved(tmp_path, kind):
    module = MODULES[kind]()
    path = save(module, tmp_path / "x.ckpt")
    loaded = type(module).load_from_checkpoint(path)
    assert torch.equal(logits(loaded), logits(module))
    assert loaded.hparams == module.hparams
    assert loaded.optimizer_config == module.optimizer_config
    again = type(module).load_from_checkpoint(save(loaded, tmp_path / "y.ckpt"))
    assert again.hparams == module.hparams
    if kind == "router with arguments":
        assert again.network.moe_layers[0].router.iterations == 3


def test_arguments_replace_the_stored_ones(tmp_path):
    path = save(MODULES["decoder_moe"](), tmp_path / "x.ckpt")
    loaded = DecoderMoEModule.load_from_checkpoint(path, balance_coef=0.125, router=Sinkhorn)
    assert (loaded.balance_coef, loaded.hparams["balance_coef"]) == (0.125, 0.125)
    assert type(loaded.network.moe_layers[0].router) is Sinkhorn


def test_a_class_of_ones_own_is_stored_without_what_is_no_plain_value(tmp_path):
    class Mine(DecoderMoEModule):
        def __init__(self, hook, note: str = "x", **kwargs):
            super().__init__(**{**SIZES, **kwargs})
            self.hook, self.note = hook, note

    class Outer(L.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.inner = Mine(object(), note="y")

    inner = Outer(lr=3).inner
    assert inner.hparams["note"] == "y"
    assert not {"hook", "lr"} & set(inner.hparams)
    path = save(inner, tmp_path / "x.ckpt")
    loaded = Mine.load_from_checkpoint(path, hook=7)
    assert (loaded.hook, loaded.note) == (7, "y")
    assert torch.equal(logits(loaded), logits(inner))


def test_wrong_loads_are_one_line_each(tmp_path):
    path = save(MODULES["decoder_moe"](), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint: .*MLPModule.*num_experts.*load it with .*DecoderMoEModule$"):
        MLPModule.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"^checkpoint: .*hparams_file=x.yaml"):
        DecoderMoEModule.load_from_checkpoint(path, hparams_file="x.yaml")
    lost = save(DecoderMoEModule(**SIZES, router=lambda *sizes: NaiveTopK(*sizes)), tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint: its router must be importable, got .*<lambda>"):
        DecoderMoEModule.load_from_checkpoint(lost)
    assert type(DecoderMoEModule.load_from_checkpoint(lost, router=NaiveTopK)) is DecoderMoEModule


def as_before(path) -> None:
    """Rewrite a checkpoint in the form of before: the configuration as text, no hyperparameters of the module."""
    checkpoint = load_checkpoint(path)
    arguments = checkpoint.pop("hyper_parameters")
    class_path = arguments.pop("_class_path")
    del checkpoint["hparams_name"], arguments["vocab_size"], arguments["optimizer"]
    data = {name: value for name, value in checkpoint["datamodule_hyper_parameters"].items() if value is not None}
    config = {"model": {"class_path": class_path, "init_args": arguments}, "data": data}
    checkpoint["run_config"] = yaml.safe_dump(config)
    save_checkpoint(checkpoint, path)


def test_a_run_logs_its_hyperparameters_and_its_checkpoint_loads(folder):
    logger = "--trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: csv}}, "
    logger += "{class_path: TensorBoardLogger, init_args: {save_dir: logs}}]"
    router = ["--model.router=sinkhorn", "--model.router.iterations=3", "--model.optimizer.learning_rate=0.25"]
    cli = run_cli("fit", *router, *SAVE, logger, tiny=[*MODEL, *DATA, *TRAINER])
    for file in folder.glob("*/*/version_0/hparams.yaml"):
        logged = yaml.safe_load(file.read_text())
        assert (logged["d_model"], logged["optimizer"]["learning_rate"], logged["vocab_size"]) == (16, 0.25, 320)
        assert logged["router"]["class_path"].endswith(".Sinkhorn")
        assert (logged["seq_len"], logged["batch_size"]) == (16, 2)
        assert not any(name.startswith("_") for name in logged)
    assert len(list(folder.glob("*/*/version_0/hparams.yaml"))) == 2
    tensorboard = next(logger for logger in cli.trainer.loggers if isinstance(logger, TensorBoardLogger))
    events = EventAccumulator(tensorboard.log_dir).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["optimizer/learning_rate"].number_value == 0.25
    assert session.hparams["num_experts"].number_value == 4

    # the same file, as it was written and as one of before would have been
    for rewrite in (lambda path: None, as_before):
        rewrite("saved/last.ckpt")
        loaded = DecoderMoEModule.load_from_checkpoint("saved/last.ckpt")
        assert torch.equal(logits(loaded), logits(cli.model))
        assert loaded.network.moe_layers[0].router.iterations == 3
        assert TextDataModule.load_from_checkpoint("saved/last.ckpt", weights_only=True).hparams["seq_len"] == 16


def test_predict_takes_dataloaders_of_ones_own():
    module = DecoderMoEModule(**SIZES, max_new_tokens=3, temperature=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    [ids] = trainer.predict(module, dataloaders=DataLoader(TOKENS, batch_size=2))
    assert ids.shape == (2, 15)
    assert torch.equal(ids[:, :12], TOKENS)
    with torch.inference_mode():
        assert torch.equal(ids[:, 14], module(ids[:, :14]).logits_BSV[:, -1].argmax(-1))
