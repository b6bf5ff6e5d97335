"""`--model.recompute` from the command line: the same run, a setting that a resume may change, and what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from scripts import run_forked_ranks
from tiny_run import DATA, MODEL, TRAINER, error_line, run_cli

from moe_lightning.models import decoder
from moe_lightning.models.decoder import Block
from moe_lightning.training import language_module
from moe_lightning.training.modules import DecoderMoEModule
from moe_lightning.utils.checkpoint_file import load_checkpoint, save_checkpoint

SCRIPT = str(Path(__file__).with_name("ep_run.py"))
FIT = ["--trainer.logger=false", "--checkpoint.monitor=null", "--run_summary.enabled=false"]
FIT += ["--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=2", "--trainer.enable_model_summary=false"]


def weights(folder):
    return load_checkpoint(f"{folder}/last.ckpt")["state_dict"]


def test_each_kind_and_a_change_in_the_middle_is_the_same_run(folder, losses):
    run_cli("fit", *FIT, "--trainer.max_steps=4", "--checkpoint.dirpath=none")
    expected, of_none = list(losses), weights("none")
    for kind in ("moe", "block"):
        losses.clear()
        run_cli("fit", *FIT, "--trainer.max_steps=4", f"--checkpoint.dirpath={kind}", f"--model.recompute={kind}")
        assert losses == expected
        assert all(torch.equal(value, of_none[name]) for name, value in weights(kind).items())
    losses.clear()
    run_cli("fit", *FIT, "--trainer.max_steps=2", "--checkpoint.dirpath=changed", "--model.recompute=moe")
    resume = ["--ckpt_path=changed/last.ckpt", "--checkpoint.dirpath=changed", "--trainer.max_steps=4"]
    cli = run_cli("fit", *FIT, *resume, "--model.recompute=block", tiny=TRAINER)
    assert cli.model.network.config.recompute == "block"
    assert losses == expected
    assert all(torch.equal(value, of_none[name]) for name, value in weights("changed").items())


@pytest.mark.parametrize("compile", [False, True])
def test_with_weights_that_are_cast_once_per_step_it_is_the_same_run_too(folder, losses, monkeypatch, compile):
    """Backward reads the copies that forward read."""
    torch.compiler.reset()
    attend = torch.compile(Block.attend, backend="aot_eager")
    monkeypatch.setattr(decoder, "_compiled_attend", lambda: attend)
    monkeypatch.setattr(language_module, "compiled", lambda function: function)
    flags = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=3"]
    flags.append(f"--model.compile={str(compile).lower()}")
    runs = []
    for kind in ("none", "moe", "block"):
        losses.clear()
        run_cli("fit", *FIT, *flags, f"--checkpoint.dirpath={kind}", f"--model.recompute={kind}")
        runs.append((list(losses), weights(kind)))
    for found, state in runs[1:]:
        assert found == runs[0][0]
        assert all(torch.equal(value, runs[0][1][name]) for name, value in state.items())
    torch.compiler.reset()


def test_a_checkpoint_of_before_has_none(folder):
    run_cli("fit", *FIT, "--trainer.max_steps=2", "--checkpoint.dirpath=saved", "--model.recompute=block")
    checkpoint = load_checkpoint("saved/last.ckpt")
    assert checkpoint["hyper_parameters"].pop("recompute") == "block"
    assert DecoderMoEModule.load_from_checkpoint("saved/last.ckpt").network.config.recompute == "block"
    save_checkpoint(checkpoint, "saved/old.ckpt")
    assert DecoderMoEModule.load_from_checkpoint("saved/old.ckpt").network.config.recompute == "none"
    cli = run_cli("fit", *FIT, "--ckpt_path=saved/old.ckpt", "--trainer.max_steps=3", tiny=TRAINER)
    assert cli.model.network.config.recompute == "none"


def test_a_dense_model_has_no_moe_layers(folder, capsys):
    dense = ["--model=transformer_decoder", "--model.d_model=16", "--model.n_heads=2", *DATA, *TRAINER]
    line = error_line(capsys, "fit", "--model.recompute=moe", tiny=dense)
    assert "transformer_decoder: recompute must be one of none, block, got 'moe'" in line


@pytest.mark.parametrize("kind", ["moe", "block"])
def test_rows_of_other_ranks_are_not_sent_again(folder, kind):
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_ep"]
    flags = ["--trainer.max_steps=2", f"--model.recompute={kind}"]
    done = run_forked_ranks(folder, SCRIPT, "fit", *MODEL, *DATA, *two, *FIT, *flags)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said
    assert all("under ddp_ep rows travel to other ranks once per pass" in line for line in said)
    assert all(f"got recompute={kind}; set --model.recompute none" in line for line in said)


@pytest.mark.gpu
def test_dropout_that_is_drawn_again_runs_eagerly_and_says_so(folder, caplog):
    caplog.set_level(logging.INFO)
    gpu = [*MODEL, *DATA, "--trainer.accelerator=gpu", "--trainer.devices=1", "--progress_bar.refresh_rate=0"]
    run_cli("fit", *FIT, "--trainer.max_steps=4", "--model.recompute=block", "--model.dropout=0.1", tiny=gpu)
    assert "cuda_graph: eager, dropout with recompute=block" in caplog.text
